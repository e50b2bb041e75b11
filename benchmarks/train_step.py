"""Measure the LoRA training step against the frozen model, full fine-tuning and ``W + A@B``.

All in one process and interleaved: in every round each variant runs once, in an order that
changes, and what is reported is the median over rounds of the ratio to the floor in the same
round. The variants:

- floor: forward and backward to the activations, base frozen, no adapters; one vector that is
  added to the input is trained, so that the backward passes through every layer.
- full: every parameter is trained.
- per call: ``W + scaling * A@B`` is built on every call.
- naive: ``(x A) B`` is added to the output of each layer (not with ``--scan``).
- nnx.LoRA: the model in Flax NNX with its own layer (not with ``--scan``).
- qwix: the model as qwix adapts it, where it is installed.
- lora: `jaxlora.lora`, in the form it chooses for each product; factored and weight-side, if named:
  in that form; dora, if named: with magnitudes; int8 and nf4, if named: over a quantized base.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interleaved
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import peers
import peers_nnx
import report

import jaxlora

FORMS = ("factored", "weight-side")
VARIANTS = ("floor", "full", "per call", "naive", "nnx.LoRA", "qwix", "lora", "dora", "int8", "nf4")


def variants(options: argparse.Namespace) -> dict[str, peers.Variant]:
    """Return for each variant its loss ``(trained, frozen, x, y)``, and what it trains and not."""
    model, targets = models.of(options)
    x, _ = data(options)
    params = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf.astype(options.dtype), params)
    config = jaxlora.LoRAConfig(rank=options.rank, alpha=16, targets=targets)
    adapted = jaxlora.init(jax.random.key(1), model.apply, params, x, config=config)
    base, adapters = jaxlora.split(adapted)
    # as after some training: with b = 0 half of the backward would be zero
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(adapters)))
    adapters = jax.tree.map(lambda f: 0.01 * jax.random.normal(next(keys), f.shape), adapters)

    def floor(vector, params, x, y):
        return models.loss(model.apply(params, x + vector), y)

    def full(params, frozen, x, y):
        return models.loss(model.apply(params, x), y)

    def lora(form, adapters=adapters):
        apply = jaxlora.lora(model.apply, strict=True, form=form)

        def loss(adapters, base, x, y):
            return models.loss(apply(jaxlora.bind(base, adapters), x), y)

        return loss, adapters, base

    def dora():
        config_m = dataclasses.replace(config, magnitude=True)
        params_m = jaxlora.init(jax.random.key(1), model.apply, params, x, config=config_m)
        magnitudes = jaxlora.split(params_m)[1]
        return lora(
            "auto",
            {
                path: dataclasses.replace(magnitudes[path], a=adapter.a, b=adapter.b)
                for path, adapter in adapters.items()
            },
        )

    def quantized(kind):
        how = jaxlora.QuantizationConfig(kind, targets=targets)
        loss, *_ = lora("auto")
        return loss, adapters, jaxlora.quantize(model.apply, base, x, config=how)

    make: dict[str, Callable[[], peers.Variant]] = {
        "floor": lambda: (floor, jnp.zeros(options.width, options.dtype), params),
        "full": lambda: (full, params, ()),
        "per call": lambda: peers.per_call(model, adapters, base),
        "naive": lambda: peers.naive(model, adapters, base),
        "nnx.LoRA": lambda: peers_nnx.nnx_lora(options),
        "qwix": lambda: peers.qwix(model, params, x, targets, options.rank, config.alpha),
        "lora": lambda: lora("auto"),
        "dora": dora,
        **{kind: functools.partial(quantized, kind) for kind in ("int8", "nf4")},
        **{form: functools.partial(lora, form) for form in FORMS},
    }
    names = dict.fromkeys(["floor", "full", *(options.variants or possible(options))])
    return {name: make[name]() for name in names}


def possible(options: argparse.Namespace) -> list[str]:
    """Return the variants there are of this model in this environment; forms have to be named."""
    names = ["floor", "full", "per call"]
    names += ["naive"] * (not options.scan)
    names += ["nnx.LoRA"] * (not options.scan)
    names += ["qwix"] * peers.has_qwix()
    return [*names, "lora"]


def data(options: argparse.Namespace) -> tuple[jax.Array, jax.Array]:
    """Return inputs and targets ``(batch, time, width)``, the batch over the devices."""
    shape = (options.batch, options.time, options.width)
    x, y = (jax.random.normal(jax.random.key(seed), shape, options.dtype) for seed in (3, 4))
    return placed((x, y), options, "data")


def placed(tree: Any, options: argparse.Namespace, *spec: str) -> Any:
    """Return copies of arrays on the devices of the options."""
    mesh = jax.sharding.Mesh(jax.devices()[: options.devices], ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.device_put(jax.tree.map(jnp.copy, tree), sharding)


class Step:
    """One compiled training step with its state, and what compiling told."""

    def __init__(self, loss: Callable[..., Any], trained: Any, frozen: Any, x: Any, y: Any):
        tx = optax.adamw(1e-6)
        self.state = (trained, tx.init(trained))
        self.rest = (frozen, x, y)
        start = time.perf_counter()
        step = models.training_step(loss, tx)
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(*self.state, *self.rest)
        lowered = traced.lower()
        self.trace_s = time.perf_counter() - start
        start = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start
        memory: Any = self.compiled.memory_analysis()
        cost: Any = self.compiled.cost_analysis()
        self.figures = {
            "trace_s": self.trace_s,
            "compile_s": self.compile_s,
            "gflops": cost["flops"] / 1e9,
            "temp_mb": memory.temp_size_in_bytes / 1e6,
            "argument_mb": memory.argument_size_in_bytes / 1e6,
        }

    def run(self) -> float:
        """Run once and return the seconds it took."""
        start = time.perf_counter()
        *self.state, value = self.compiled(*self.state, *self.rest)
        jax.block_until_ready((self.state, value))
        if not np.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compile all variants, run them interleaved, and return the figures of each."""
    x, y = data(options)
    steps = {  # of copies, for a step donates its state
        name: Step(loss, *placed((trained, frozen), options), x, y)
        for name, (loss, trained, frozen) in variants(options).items()
    }
    apart = [name for name in steps if name not in FORMS]
    if len({steps[name].compiled.as_text() for name in apart}) != len(apart):
        raise RuntimeError("two variants compiled to one program: nothing would be compared")
    timed = interleaved.measure(steps, options.rounds, options.warmup)
    return {name: {**timed[name], **steps[name].figures} for name in steps}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of the model and the measurement."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "layers": 6,
        "width": 384,
        "hidden": 1536,
        "heads": 6,
        "groups": 2,
        "batch": 8,
        "time": 128,
        "rank": 8,
        "devices": 1,
        "rounds": 11,
        "warmup": 2,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    for name, help_ in {
        "scan": "scan over the blocks",
        "remat": "compute each block again in the backward pass",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", help=help_)
    for name, choices, default, help_ in (
        ("targets", models.GATED_TARGETS, None, "adapted layers, default all of the model"),
        ("variants", (*VARIANTS, *FORMS), None, "beside floor and full, default all that can run"),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=default, metavar="NAME", help=help_
        )
    parser.add_argument(
        "--model",
        choices=models.NAMES,
        default=models.NAMES[0],
        help="of these sizes, default transformer; groups of heads are a Llama's alone",
    )
    parser.add_argument("--dtype", default="float32", help="of base and inputs, default float32")
    parser.add_argument("--out", type=Path, help="write JSON here")
    return parser


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__).parse_args()
    results = measure(options)
    report.finish(options, results)


if __name__ == "__main__":
    main()
