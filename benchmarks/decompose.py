"""Measure the fast decomposition of PiSSA against the exact one: seconds, and error of the rest.

The weights are square, with singular values that fall as ``i ** -power``; a power of zero is the
hardest case, all equal but for chance. ``error_over_exact`` is the norm of what is left of the
weight over the least that any product of the rank leaves.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import report

import jaxlora


def weight(size: int, power: float) -> jax.Array:
    """Return a matrix of normal numbers, its columns scaled before a random turn."""
    left, right = (jax.random.normal(jax.random.key(i), (size, size)) for i in (0, 1))
    turned = jnp.linalg.qr(right)[0]
    return (left * jnp.arange(1, size + 1) ** -power) @ turned / size**0.5


def started(name: str, initializer: Callable, w: jax.Array, rank: int) -> tuple[float, float]:
    """Return the seconds that a start from the weight takes, compiled, and what it leaves."""

    def model(params, x):
        return x @ params["w"]

    config = jaxlora.LoRAConfig(rank=rank, initializer=initializer)
    x = jax.ShapeDtypeStruct((1, len(w)), w.dtype)
    seconds = []
    for seed in range(2):  # the first compiles
        start = time.perf_counter()
        params = jaxlora.init(jax.random.key(seed), model, {"w": w}, x, config=config)
        jax.block_until_ready(params)
        seconds.append(time.perf_counter() - start)
    print(f"{name}: {seconds[-1]:.2f} s", flush=True)
    return seconds[-1], float(jnp.linalg.norm(params["w"].base))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"size": 4096, "rank": 16, "iterations": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--powers", type=float, nargs="+", default=[0.0, 0.5], help="0 and 0.5")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    results = {}
    for power in options.powers:
        w = weight(options.size, power)
        exact, least = started("exact", jaxlora.initializers.pissa(), w, options.rank)
        fast, left = started(
            "fast", jaxlora.initializers.pissa(options.iterations), w, options.rank
        )
        results[f"power {power}"] = {
            "exact_s": exact,
            "fast_s": fast,
            "times_faster": exact / fast,
            "error_over_exact": left / least,
        }
    report.finish(options, results)


if __name__ == "__main__":
    main()
