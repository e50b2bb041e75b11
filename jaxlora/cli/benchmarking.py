"""``jaxlora bench``: whether a step with adapters is near its floor on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer

from jaxlora.cli import output
from jaxlora.targets.config import LoRAConfig
from jaxlora.tracing.transform import lora
from jaxlora.trees.adapting import init
from jaxlora.trees.binding import bind, split
from jaxlora.types import Json, Leaf, Leaves

EXPECTED = 1.4  # a ratio above it is not near the floor; two CPU cores measure about 1.1
_LAYERS, _WIDTH, _HIDDEN, _TOKENS, _RANK = 4, 256, 1024, 512, 8
Step = Callable[[], object]


def bench(
    rounds: Annotated[int, typer.Option(min=3, help="How often each step is timed.")] = 25,
    as_json: output.AsJson = False,
) -> None:
    """Time a training step of a small adapted model over the frozen model's own step.

    The frozen model's step is a forward and a backward pass to the activations, without adapters:
    no way to train adapters through it can be cheaper. The two are timed by turns, and the ratio is
    the median over rounds. Exit code 1 if it is above 1.4, as on a machine that is busy.

    Example: jaxlora bench --json
    """
    steps = _steps()
    with output.working("compiling"):
        for step in steps.values():
            jax.block_until_ready(step())
    times = _times(steps, rounds)
    report = _report(times)
    if as_json:
        output.print_json(report)
    else:
        _print(report)
    if not report["near_floor"]:
        raise typer.Exit(1)


def _model(params: Leaves, x: Leaf) -> Leaf:
    for layer in params.values():
        x = x + jax.nn.gelu(x @ layer["up"]) @ layer["down"]
    return x


def _steps() -> dict[str, Step]:
    """Return the step of the frozen model and that with adapters, with their arguments."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * _LAYERS + 2))
    shapes = {"up": (_WIDTH, _HIDDEN), "down": (_HIDDEN, _WIDTH)}
    params = {
        f"layer_{i}": {
            name: jax.random.normal(next(keys), shape) / shape[0] ** 0.5
            for name, shape in shapes.items()
        }
        for i in range(_LAYERS)
    }
    x, y = (jax.random.normal(next(keys), (_TOKENS, _WIDTH)) for _ in range(2))
    adapted = init(jax.random.key(1), _model, params, x, config=LoRAConfig(rank=_RANK))
    base, adapters = split(adapted)
    adapters = jax.tree.map(lambda factor: factor + 0.01, adapters)  # as after some training
    apply = lora(_model)

    def frozen(x: Leaf, base: Leaf) -> Leaf:
        return jnp.mean((_model(base, x) - y) ** 2)

    def trained(adapters: Leaf, base: Leaf, x: Leaf) -> Leaf:
        return jnp.mean((apply(bind(base, adapters), x) - y) ** 2)

    frozen_step, adapted_step = (jax.jit(jax.value_and_grad(fn)) for fn in (frozen, trained))
    return {
        "frozen": lambda: frozen_step(x, base),
        "adapted": lambda: adapted_step(adapters, base, x),
    }


def _times(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, in an order that changes."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in output.track(range(rounds), "timing"):
        for name in sorted(steps, reverse=number % 2 == 1):
            start = time.perf_counter()
            jax.block_until_ready(steps[name]())
            times[name].append(time.perf_counter() - start)
    return times


def _report(times: dict[str, list[float]]) -> Json:
    pairs = zip(times["adapted"], times["frozen"], strict=True)
    ratio = statistics.median(adapted / frozen for adapted, frozen in pairs)
    device = jax.devices()[0]
    model: dict[str, Any] = {"layers": _LAYERS, "width": _WIDTH, "hidden": _HIDDEN}
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "model": model | {"tokens": _TOKENS, "rank": _RANK},
        "rounds": len(times["frozen"]),
        "frozen_s": statistics.median(times["frozen"]),
        "adapted_s": statistics.median(times["adapted"]),
        "ratio": ratio,
        "expected_below": EXPECTED,
        "near_floor": ratio <= EXPECTED,
    }


def _print(report: Json) -> None:
    print(f"{report['device']}: {report['rounds']} rounds, float32, rank {report['model']['rank']}")
    for name, what in (("frozen_s", "the frozen model"), ("adapted_s", "with adapters")):
        print(f"{1000 * report[name]:8.2f} ms a step {what}")
    verdict = "near its floor" if report["near_floor"] else "not near its floor"
    print(f"{report['ratio']:8.2f} times the frozen model: {verdict} (at most {EXPECTED})")
