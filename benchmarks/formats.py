"""Measure how fast files of other libraries are read and written.

- peft: the adapters of a Llama of 7 billion weights, rank 16 on all of its 224 linear layers, as a
  folder of PEFT; loading against safetensors reading the same file, saving against it writing the
  same tensors. Each loads in a process of its own, once and again: what a process loads first has
  memory that is new, and in one process the second would have what the first gave back.
- merged: weights of so many bytes, each adapted, merged and written as a checkpoint; against the
  disk writing as many bytes, with `fsync` in both.

In every round the two run one after the other, and the median of their ratios is reported.
"""

import argparse
import functools
import multiprocessing
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
from merge import seconds
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import Names, peft, safetensors
from jaxlora.targets import Sites

SIZES = {
    **dict.fromkeys(["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"], (4096, 4096)),
    **dict.fromkeys(["mlp.gate", "mlp.up"], (4096, 11008)),
    "mlp.down": (11008, 4096),
}
LAYERS = 32


def ratios(
    ours: Callable[[], Any], theirs: Callable[[], Any], size: int, rounds: int
) -> dict[str, float]:
    """Return the median times of both, and of their ratio in each round."""
    return of_pairs([(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:], size)


def of_pairs(pairs: list[tuple[float, float]], size: int) -> dict[str, float]:
    """Return the medians of the seconds of both in each round, and of their ratio."""
    return {
        "mb": size / 1e6,
        "seconds": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def llama() -> tuple[Sites, Names]:
    """Return where the adapters of a Llama go, and what PEFT calls their modules."""
    layer = {name: jax.ShapeDtypeStruct(size, jnp.bfloat16) for name, size in SIZES.items()}
    params = {str(i): layer for i in range(LAYERS)}

    def fn(params, inputs):
        return [inputs[w.shape[0]] @ w for layer in params.values() for w in layer.values()]

    inputs = {n: jax.ShapeDtypeStruct((1, n), jnp.bfloat16) for n in (4096, 11008)}
    names = Names(
        *((f"model.layers.{{i}}.{name}_proj", f"{{i}}/{name}") for name in SIZES),
    )
    return jaxlora.find_sites(fn, params, inputs), names


def loads(is_ours: bool, folder: Path) -> tuple[float, float]:
    """Return the seconds of the first load of a process, and of one after it."""
    if is_ours:
        sites, names = llama()
        jax.block_until_ready(jax.device_put(np.ones(1)))  # JAX has started
        load = functools.partial(peft.load, folder, sites=sites, names=names)
    else:
        load = functools.partial(load_file, folder / "adapter_model.safetensors")
    first, *others = (seconds(load) for _ in range(6))
    return first, statistics.median(others)


def in_new_processes(folder: Path, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of loading in processes that have loaded nothing, and again there."""
    spawn, both = multiprocessing.get_context("spawn"), [(True, folder), (False, folder)]
    with spawn.Pool(1, maxtasksperchild=1) as processes:
        measured = [processes.starmap(loads, both, chunksize=1) for _ in range(rounds)]
    first, again = ([(ours[i], theirs[i]) for ours, theirs in measured] for i in range(2))
    return {"peft load": of_pairs(first, size), "peft load, again": of_pairs(again, size)}


def of_llama(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of loading and saving the adapters of a Llama."""
    sites, names = llama()
    adapters = {}
    for site in sites:
        a, b = site.roles.factor_shapes(site.shape, 16)
        adapters[site.path] = jaxlora.Adapter(
            jnp.ones(a), jnp.ones(b), site.roles, alpha=16.0, shape=site.shape
        )
    peft.save(folder / "peft", adapters, names=names)
    file = folder / "peft" / "adapter_model.safetensors"
    arrays, size = load_file(file), file.stat().st_size
    return {
        **in_new_processes(folder / "peft", size, rounds),
        "peft save": ratios(
            lambda: peft.save(folder / "peft", adapters, names=names),
            lambda: save_file(arrays, folder / "theirs.safetensors"),
            size,
            rounds,
        ),
    }


def synced(path: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def merged(folder: Path, gigabytes: float, rounds: int) -> dict[str, float]:
    """Return the figures of merging and writing weights."""
    count = round(gigabytes * 1e9 / (4096**2 * 2))
    params = {f"w{i}": jnp.full((4096, 4096), i, jnp.bfloat16) for i in range(count)}

    def fn(params, x):
        return [x @ w for w in params.values()]

    x = jax.ShapeDtypeStruct((1, 4096), jnp.bfloat16)
    config = jaxlora.LoRAConfig(rank=8)
    adapted = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    base, adapters = jaxlora.split(adapted)
    adapted = jaxlora.bind(base, jax.tree.map(lambda leaf: leaf + 0.1, adapters))
    sites, names = jaxlora.find_sites(fn, params, x), Names(("{w}", "{w}"))
    data = np.random.default_rng(0).bytes(count * 4096**2 * 2)

    def ours():
        safetensors.save(folder / "merged", adapted, names, sites=sites)
        synced(folder / "merged")

    def theirs():
        (folder / "raw").mkdir(exist_ok=True)
        (folder / "raw" / "data").write_bytes(data)
        synced(folder / "raw")

    return ratios(ours, theirs, len(data), rounds)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="merged, default 1")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        results = of_llama(folder, options.rounds)
        results["merged save"] = merged(folder, options.gigabytes, options.rounds)
    finally:
        shutil.rmtree(folder)
    report.finish(options, results)


if __name__ == "__main__":
    main()
