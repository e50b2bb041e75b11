"""Run every benchmark, or those named, each in an environment that is made for it.

    python benchmarks/run.py                       # all that can run here, about three hours
    python benchmarks/run.py train_step peers_torch

An environment is a folder in ``benchmarks/.environments`` with this project and the peers that can
live beside it (``jax``: qwix; ``tpu``: with the compiler for TPU; ``gpu``: with JAX for it) or a
peer alone (``torch``: PEFT), made once from PyPI. Results are written to ``benchmarks/results`` as
``<benchmark>_<device>_<version>.json``; `plot.py` draws them.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent

PACKAGES = {
    "jax": ["-e", f"{HERE.parent}[formats]", "qwix==0.1.8", "matplotlib>=3.9"],
    "tpu": ["-e", f"{HERE.parent}[tpu]", "qwix==0.1.8"],
    "gpu": ["-e", f"{HERE.parent}[formats]", "jax[cuda12]", "qwix==0.1.8"],
    "torch": ["torch==2.13.0", "peft==0.21.2"],
}
TELL = {  # prints the device and the version that the results are named by
    "jax": "import jax; print(jax.devices()[0].platform, 'jax' + jax.__version__)",
    "tpu": "import jax; print('tpu', 'jax' + jax.__version__)",
    "gpu": "import jax; print(jax.devices('gpu')[0].device_kind.split()[-1].lower(), "
    "'jax' + jax.__version__)",
    "torch": "import torch; print(torch.cuda.get_device_name().split()[-1].lower() "
    "if torch.cuda.is_available() else 'cpu', 'torch' + torch.__version__.partition('+')[0])",
}
WIDE = "--layers 2 --width 768 --hidden 3072 --heads 12 --batch 4 --time 512"
LLAMA = (
    "--model llama --layers 4 --width 4096 --hidden 14336 --heads 32 --groups 8 "
    "--batch 2 --time 2048 --rank 16 --dtype bfloat16 --remat"
)


class Benchmark(NamedTuple):
    """What is run.

    Attributes:
        environment: the kind of environment, a key of `PACKAGES`.
        command: the script and its options.
        about: what it measures, in a line.
    """

    environment: str
    command: str
    about: str


BENCHMARKS = {
    "train_step": Benchmark("jax", "train_step.py", "a training step, beside other libraries"),
    "train_step_forms": Benchmark(
        "jax",
        "train_step.py --variants floor full factored weight-side lora",
        "the same with each form of the product forced",
    ),
    "train_step_magnitudes": Benchmark(
        "jax", "train_step.py --variants floor full lora dora", "the same with magnitudes (DoRA)"
    ),
    "train_step_quantized": Benchmark(
        "jax",
        "train_step.py --variants floor full lora int8 nf4",
        "the same over a quantized base",
    ),
    "train_step_wide_remat_scan": Benchmark(
        "jax", f"train_step.py {WIDE} --remat --scan", "the same of wide layers, scanned"
    ),
    "train_step_bfloat16": Benchmark(
        "jax", "train_step.py --layers 3 --dtype bfloat16", "the same over a base in bfloat16"
    ),
    "peers_torch": Benchmark("torch", "peers_torch.py", "the same model with PEFT on PyTorch"),
    "memory": Benchmark(
        "jax",
        "memory.py --variants floor full naive factored weight-side lora",
        "bytes of a compiled training step",
    ),
    "merge": Benchmark("jax", "merge.py", "merging, against copying the same bytes"),
    "formats": Benchmark("jax", "formats.py", "files of PEFT and Hugging Face, read and written"),
    "decompose": Benchmark("jax", "decompose.py", "the fast decomposition of PiSSA, and the exact"),
    "llama": Benchmark("jax", "llama.py", "bytes of a step of a Llama of 7 billion weights"),
    "compiled_for": Benchmark("tpu", "tpu.py", "steps compiled for a TPU that is not there"),
    "tpu_mesh": Benchmark("tpu", "tpu_mesh.py", "steps of 8B and 70B compiled for slices of TPUs"),
    "scaling": Benchmark("jax", "scaling.py", "a step against tokens, rank, sites and devices"),
    "compile": Benchmark("jax", "compile.py", "tracing and compiling, against the plain function"),
    "gpu": Benchmark("gpu", f"train_step.py {LLAMA}", "a step of layers of Llama 3 8B on a GPU"),
    "gpu_torch": Benchmark("torch", f"peers_torch.py {LLAMA}", "the same with PEFT on PyTorch"),
}
NEED_GPU = ("gpu", "gpu_torch")
UNTIMED = ("decompose.py", "llama.py", "tpu.py", "tpu_mesh.py")  # which have no rounds


def environment(name: str) -> Path:
    """Return the interpreter of an environment, which is made if there is none."""
    folder = HERE / ".environments" / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"== making {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return python


def run(name: str, folder: Path, extra: list[str]) -> None:
    """Run one benchmark and write its results to the folder."""
    kind, command, _ = BENCHMARKS[name]
    python = environment(kind)
    told = subprocess.run([python, "-c", TELL[kind]], check=True, capture_output=True, text=True)
    out = folder / f"{name}_{'_'.join(told.stdout.split())}.json"
    print(f"== {name} -> {out}", flush=True)
    script, *options = command.split()
    options += extra if script not in UNTIMED else []
    subprocess.run([python, HERE / script, *options, "--out", out], check=True)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    width = max(map(len, BENCHMARKS))
    lines = (f"  {name:{width}}  {found.about}" for name, found in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["benchmarks:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help="of a benchmark, default all that can run here"
    )
    parser.add_argument(
        "--rounds", type=int, help="of each that has rounds, default as the benchmark's"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmarks: {unknown}; there are {list(BENCHMARKS)}")
    here = [name for name in BENCHMARKS if name not in NEED_GPU or shutil.which("nvidia-smi")]
    if cannot := [name for name in options.names if name not in here]:
        parser.error(f"{cannot} need a GPU of NVIDIA: there is no nvidia-smi on this machine")
    options.names = options.names or here
    return options


def main() -> None:
    """Run the benchmarks."""
    options = parse()
    extra = ["--rounds", str(options.rounds)] if options.rounds else []
    for name in options.names:
        run(name, options.results, extra)
    subprocess.run([environment("jax"), HERE / "plot.py", options.results], check=True)


if __name__ == "__main__":
    main()
