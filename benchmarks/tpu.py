"""Compile training steps for a TPU that is not there, and tell what its compiler counts.

libtpu compiles for a TPU without one. Of a compiled step it tells the operations, the bytes that
are read and written, the bytes of temporaries, and the seconds that the two could take at best.
These are counts of a compiler and no measurements: they do not depend on how busy a machine is.
For some chips it tells no time. Of layers that are scanned the compiler counts one, beside all that
is outside of them, as the update of the factors of every layer; in full, time and bytes of the
layer are taken as often as there are layers.

The model has the shapes of Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3) in
bfloat16, with adapters on all of its products. The variants:

- floor: forward and backward to the activations, base frozen, no adapters; one vector that is
  added to the input is trained, so that the backward passes through every layer.
- full: every parameter is trained.
- lora, dora, int8, nf4: `jaxlora.lora`, alone, with magnitudes, over a quantized base.
- qwix, qwix int8, qwix nf4: the model as qwix adapts it.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import peers
import report
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxlora

WIDTH = 4096
KINDS = ("int8", "nf4")
COMPARED = ("best_ms", "gflops", "gb", "temp_gb", "best_ms_in_full", "gb_in_full")


@dataclasses.dataclass(frozen=True)
class Case:
    """A step that is compiled.

    Attributes:
        variants: what is compiled beside the floor.
        chip: generation of the TPU.
        layers: number of layers.
        batch: rows of the batch.
        tokens: tokens of a row.
        rank: rank of the adapters.
        targets: the products that have one.
        scan: whether the layers are scanned.
        remat: whether each layer is computed again in the backward pass.
        trains: whether it is a training step, or else a forward pass.
        on_host: whether frozen matrices are in host memory, and those of a layer are moved to the
            chip when it is reached.
    """

    variants: tuple[str, ...] = ("lora",)
    chip: str = "v5p"
    layers: int = 4
    batch: int = 2
    tokens: int = 2048
    rank: int = 16
    targets: tuple[str, ...] = models.GATED_TARGETS
    scan: bool = True
    remat: bool = True
    trains: bool = True
    on_host: bool = False


CASES = {
    "scanned": Case(("full", "lora", "qwix")),
    "unrolled": Case(scan=False, layers=2),
    "without remat": Case(remat=False),
    "rank 64": Case(rank=64),
    "queries and values": Case(targets=("q", "v")),
    "512 tokens": Case(batch=1, tokens=512),
    "v5e": Case(("lora", "qwix"), chip="v5e"),
    "v6e": Case(("lora", "qwix"), chip="v6e"),
    "magnitudes": Case(("lora", "dora")),
    "magnitudes without remat": Case(("lora", "dora"), remat=False),
    "quantized": Case(("lora", "int8", "qwix int8", "nf4", "qwix nf4")),
    "decoding": Case(batch=8, tokens=1, trains=False),
    "host memory": Case(("lora", "nf4"), on_host=True),
}


class Moved(models.Llama):
    """The same layers, each of which moves its weights to the chip."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""

        def to_chip(weights):
            return jax.device_put(weights, jax.memory.Space.Device)

        kind = nn.map_variables(models.GatedBlock, "params", to_chip, init=self.is_initializing())
        return self.through(kind, (self.heads, self.groups, self.hidden, self.dtype), x)


def variants(case: Case, names: list[str]) -> dict[str, Callable[[], peers.Variant]]:
    """Return makers of the loss ``(trained, frozen, x, y)`` and the shapes of what it trains."""
    kind = Moved if case.on_host else models.Llama
    model = kind(case.layers, scan=case.scan, remat=case.remat)
    x = jax.ShapeDtypeStruct((case.batch, case.tokens, WIDTH), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    config = jaxlora.LoRAConfig(rank=case.rank, alpha=16, targets=case.targets)

    def floor(vector, params, x, y):
        return models.loss(model.apply(params, x + vector), y)

    def full(params, _, x, y):
        return models.loss(model.apply(params, x), y)

    def lora(params=params, **options):
        how = dataclasses.replace(config, **options)
        adapted = jax.eval_shape(
            lambda params: jaxlora.init(jax.random.key(1), model.apply, params, x, config=how),
            params,
        )
        base, adapters = jaxlora.split(adapted)
        apply = jaxlora.lora(model.apply, strict=True)

        def loss(adapters, base, x, y):
            return models.loss(apply(jaxlora.bind(base, adapters), x), y)

        return loss, adapters, base

    def over(kind):
        how = jaxlora.QuantizationConfig(kind, targets=case.targets)
        return lora(jaxlora.quantize(model.apply, params, x, config=how))

    make: dict[str, Callable[[], peers.Variant]] = {
        "floor": lambda: (floor, jax.ShapeDtypeStruct((WIDTH,), x.dtype), params),
        "full": lambda: (full, params, ()),
        "lora": lora,
        "dora": lambda: lora(magnitude=True),
        "qwix": lambda: by_qwix(model, case, x),
        **{kind: lambda kind=kind: over(kind) for kind in KINDS},
        **{f"qwix {kind}": lambda kind=kind: by_qwix(model, case, x, kind) for kind in KINDS},
    }
    return {name: make[name] for name in names}


def by_qwix(model: nn.Module, case: Case, x: Any, kind: str | None = None) -> peers.Variant:
    """Return the variant of the model as qwix adapts it."""
    options = {"weight_qtype": kind, "tile_size": 64} if kind else {}
    variant = peers.qwix_shapes(model, x, case.targets, case.rank, 16.0, **options)
    peers.check_all_adapted(variant[1], len(case.targets))
    return variant


@functools.cache
def mesh_of(chip: str) -> Mesh:
    """Return the mesh of one chip of a generation."""
    topology = topologies.get_topology_desc(f"{chip}:1x1x1", "tpu")
    return Mesh(np.array(topology.devices[:1]), ("chip",))


def placed(case: Case, tree: Any, *, on_host: bool = False) -> Any:
    """Return the shapes of a tree on one chip, or those of matrices in the memory of its host."""

    def place(leaf):
        memory = "pinned_host" if on_host and leaf.ndim > 2 else "device"  # matrices are stacked
        sharding = NamedSharding(mesh_of(case.chip), PartitionSpec(), memory_kind=memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def told(case: Case, variant: peers.Variant) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the figures of a step or a forward pass, and those of the update in it alone."""
    loss, trained, frozen = variant
    tx = optax.adamw(1e-4)
    x = placed(case, jax.ShapeDtypeStruct((case.batch, case.tokens, WIDTH), jnp.bfloat16))
    trained = placed(case, trained)
    frozen = placed(case, frozen, on_host=case.on_host)
    if not case.trains:
        return compiled(loss, (), trained, frozen, x, x), []
    state = placed(case, jax.eval_shape(tx.init, trained))
    step = compiled(models.training_step(loss, tx), (0, 1), trained, state, frozen, x, x)
    return step, [compiled(functools.partial(models.update, tx), (0, 1), trained, state, trained)]


def compiled(program: Callable[..., Any], donated: tuple[int, ...], *args: Any) -> dict[str, float]:
    """Return what the compiler tells of a program of shapes, some of which it writes anew."""
    return figures(jax.jit(program, donate_argnums=donated).lower(*args).compile())


def need_no_tpu() -> None:
    """Let libtpu compile on a machine that has no TPU."""
    jax.config.update("jax_platforms", "cpu")  # what compiles, not what it is compiled for
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def figures(program: Any) -> dict[str, float]:
    """Return what the compiler tells of a program."""
    cost, memory, text = program.cost_analysis(), program.memory_analysis(), program.as_text()
    seconds = cost["optimal_seconds"]
    return {
        "best_ms": seconds * 1e3 if seconds > 0 else math.nan,  # of some chips it is negative
        "gflops": cost["flops"] / 1e9,
        "gb": cost["bytes accessed"] / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "fusions": text.count(" fusion("),
        "copies": text.count(" copy("),
    }


def in_full(layers: int, once: dict[str, float], *outside: dict[str, float]) -> dict[str, float]:
    """Return the figures of a program of scanned layers, of which the compiler counts one.

    What is outside of the layers is taken off, and the rest is taken as often as there are layers:
    less than it is, where a layer has loops of its own.

    Args:
        layers: how many there are.
        once: what the compiler tells of the program.
        *outside: what it tells of the parts outside of the layers.
    """
    rest = {key: sum(part[key] for part in outside) for key in once}
    return {key: rest[key] + layers * (once[key] - rest[key]) for key in once}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of each variant of each case, and their ratios to its floor."""
    rows: dict[str, dict[str, float]] = {}
    for name in options.cases:
        case = CASES[name]
        none = dataclasses.replace(case, layers=0, scan=False)
        without_layers, _ = told(none, variants(none, ["floor"])["floor"]())
        floor: dict[str, float] = {}
        for variant, make in variants(case, ["floor", *case.variants]).items():
            start = time.perf_counter()
            row, update = told(case, make())
            whole = in_full(case.layers, row, without_layers, *update) if case.scan else row
            row |= {f"{key}_in_full": whole[key] for key in ("best_ms", "gb")}
            floor = floor or row
            ratios = {f"{key}_over_floor": row[key] / floor[key] for key in COMPARED}
            rows[f"{name}: {variant}"] = {**ratios, **row}
            seconds = time.perf_counter() - start
            shown = ", ".join(f"{key} {value:.3f}" for key, value in ratios.items())
            print(f"{name}: {variant}: {shown} ({seconds:.0f} s)", flush=True)
            report.write(options, rows, "compiled for TPU")
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default all"
    )
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    need_no_tpu()
    report.finish(options, measure(options), "compiled for TPU")


if __name__ == "__main__":
    main()
