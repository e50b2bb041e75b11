"""Measure how long tracing and compiling takes with adapters, against the plain function.

All in one process and interleaved, every cache of JAX cleared before each measurement; what is
reported is the median over rounds of the ratio in the same round. The programs, each plain and
adapted, at several numbers of layers, unrolled, unrolled with each block rematerialized, or as one
scanned block:

- forward: the function itself.
- step: the loss and its gradient, of every parameter (plain) or of the factors (adapted).
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import report

import jaxlora
from jaxlora.messages import table

KINDS = {"unrolled": {}, "remat": {"remat": True}, "scanned": {"scan": True}}


def seconds(fn: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Return the seconds that tracing and compiling take, nothing left of what was before."""
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def programs(model: nn.Module, rank: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return the programs by name, each with the shapes of its arguments."""
    x = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    config = jaxlora.LoRAConfig(rank=rank)

    def init(params, x):
        return jaxlora.init(jax.random.key(0), model.apply, params, x, config=config)

    base, adapters = jaxlora.split(jax.eval_shape(init, params, x))
    apply = jaxlora.lora(model.apply, strict=True)

    def plain(params, x):
        return models.loss(model.apply(params, x), x)

    def adapted(adapters, base, x):
        return models.loss(apply(jaxlora.bind(base, adapters), x), x)

    return {
        "forward": (model.apply, (params, x)),
        "forward, adapted": (apply, (jaxlora.bind(base, adapters), x)),
        "step": (jax.value_and_grad(plain), (params, x)),
        "step, adapted": (jax.value_and_grad(adapted), (adapters, base, x)),
    }


def measure(model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return for each adapted program its times, and their ratios to the plain one."""
    rounds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, (fn, args) in programs(model, options.rank).items():
            rounds.setdefault(name, []).append(seconds(fn, *args))
    rows = []
    for name in ("forward", "step"):
        pairs = list(zip(rounds[f"{name}, adapted"], rounds[name], strict=True))
        trace_s, compile_s = map(statistics.median, zip(*rounds[f"{name}, adapted"], strict=True))
        rows.append(
            {
                "program": name,
                "trace_s": trace_s,
                "compile_s": compile_s,
                "trace_ratio": statistics.median(a[0] / b[0] for a, b in pairs),
                "compile_ratio": statistics.median(a[1] / b[1] for a, b in pairs),
                "ratio": statistics.median(sum(a) / sum(b) for a, b in pairs),
            }
        )
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    layers = [8, 32, 80]
    parser.add_argument("--layers", type=int, nargs="+", default=layers, help=f"default {layers}")
    parser.add_argument("--rank", type=int, default=8, help="default 8")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()

    results = []
    for count in options.layers:
        for kind, how in KINDS.items():
            model = models.Transformer(count, heads=4, hidden=256, **how)
            rows = measure(model, options)
            results += [{"layers": count, "kind": kind, **row} for row in rows]
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()] for r in results]
    print(table.render(list(results[0]), cells))
    report.write(options, results)


if __name__ == "__main__":
    main()
