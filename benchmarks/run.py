"""Run every benchmark, or those named, each in an environment that is made for it.

    python benchmarks/run.py                       # all, about half an hour
    python benchmarks/run.py train_step peers_torch

An environment is a folder in ``benchmarks/.environments`` with this project and the peers that can
live beside it (``jax``: qwix) or a peer alone (``torch``: PEFT), made once from PyPI. Results are
written to ``benchmarks/results`` as ``<benchmark>_<device>_<version>.json``; `plot.py` draws them.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent

PACKAGES = {
    "jax": ["-e", f"{HERE.parent}", "qwix==0.1.8", "matplotlib>=3.9"],
    "torch": ["torch==2.13.0", "peft==0.21.2"],
}
TELL = {  # prints the device and the version that the results are named by
    "jax": "import jax; print(jax.devices()[0].platform, 'jax' + jax.__version__)",
    "torch": "import torch; print('cuda' if torch.cuda.is_available() else 'cpu', "
    "'torch' + torch.__version__.partition('+')[0])",
}
WIDE = "--layers 2 --width 768 --hidden 3072 --heads 12 --batch 4 --time 512"
BENCHMARKS = {  # environment, script and options
    "train_step": ("jax", "train_step.py"),
    "train_step_forms": ("jax", "train_step.py --variants floor full factored weight-side lora"),
    "train_step_magnitudes": ("jax", "train_step.py --variants floor full lora dora"),
    "train_step_quantized": ("jax", "train_step.py --variants floor full lora int8 nf4"),
    "train_step_wide_remat_scan": ("jax", f"train_step.py {WIDE} --remat --scan"),
    "train_step_bfloat16": ("jax", "train_step.py --layers 3 --dtype bfloat16"),
    "peers_torch": ("torch", "peers_torch.py"),
    "memory": ("jax", "memory.py --variants floor full naive factored weight-side lora"),
    "merge": ("jax", "merge.py"),
    "decompose": ("jax", "decompose.py"),
    "llama": ("jax", "llama.py"),
    "scaling": ("jax", "scaling.py"),
    "compile": ("jax", "compile.py"),
}
UNTIMED = ("decompose.py", "llama.py")  # which have no rounds


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
    kind, command = BENCHMARKS[name]
    python = environment(kind)
    told = subprocess.run([python, "-c", TELL[kind]], check=True, capture_output=True, text=True)
    out = folder / f"{name}_{'_'.join(told.stdout.split())}.json"
    print(f"== {name} -> {out}", flush=True)
    script, *options = command.split()
    options += extra if script not in UNTIMED else []
    subprocess.run([python, HERE / script, *options, "--out", out], check=True)


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="default all")
    parser.add_argument("--rounds", help="of each that has rounds, default as the benchmark's")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder")
    options = parser.parse_args()
    extra = ["--rounds", options.rounds] if options.rounds else []
    for name in options.names or BENCHMARKS:
        run(name, options.results, extra)
    subprocess.run([environment("jax"), HERE / "plot.py", options.results], check=True)


if __name__ == "__main__":
    main()
