"""Measure how fast weights are merged, against copying the same bytes, and the memory it takes.

In every round a copy and a merge run one after the other, and the median of their ratios is
reported. Peak memory is that of the process: what it held with the weights and their factors, and
by how much it grew while they were merged with ``donate=True``.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

import jaxlora
from jaxlora.messages import table


def seconds(run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def peak_mb() -> float:
    """Return the largest memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def adapted(options: argparse.Namespace) -> Any:
    """Return weights of so many bytes, each adapted."""
    count = round(options.gigabytes * 1e9 / (options.width**2 * np.dtype(options.dtype).itemsize))
    weight = jnp.ones((options.width, options.width), options.dtype)
    params = {f"w{i}": weight + i for i in range(count)}

    def fn(params, x):
        return [x @ w for w in params.values()]

    x = jax.ShapeDtypeStruct((1, options.width), options.dtype)
    config = jaxlora.LoRAConfig(rank=options.rank)
    return jaxlora.init(jax.random.key(0), fn, params, x, config=config)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of copying and merging."""
    jax.block_until_ready(params := adapted(options))
    held = peak_mb()
    jax.block_until_ready(jaxlora.merge(params, donate=True))
    grown = peak_mb() - held
    params = adapted(options)
    arrays = [np.asarray(w) for w in jaxlora.split(params)[0].values()]
    copies, merges = [], []
    for i in range(options.warmup + options.rounds):
        copied = seconds(lambda: [array.copy() for array in arrays])
        merged = seconds(lambda: jaxlora.merge(params))
        if i >= options.warmup:
            copies.append(copied)
            merges.append(merged)
    size = sum(array.nbytes for array in arrays)
    return {
        "weights_mb": size / 1e6,
        "copy_gb_s": size / statistics.median(copies) / 1e9,
        "merge_gb_s": size / statistics.median(merges) / 1e9,
        "merge_over_copy": statistics.median(c / m for c, m in zip(copies, merges, strict=True)),
        "peak_mb_held": held,
        "peak_mb_grown": grown,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of weights, default 1")
    for name, default in {"width": 4096, "rank": 8, "rounds": 5, "warmup": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", default="float32", help="of the weights, default float32")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    results = measure(options)
    print(table.render(list(results), [[f"{value:.2f}" for value in results.values()]]))
    report.write(options, results)


if __name__ == "__main__":
    main()
