"""Compile training steps for slices of TPUs that are not there: what fits, and what is sent.

libtpu compiles for a slice without one. The models have the sizes of Llama 3 (Grattafiori et al.
2024, arXiv:2407.21783, table 3), bfloat16, with layers that are scanned and computed again in the
backward pass, adapters of rank 16 on all of their products, and AdamW. Weights are split over a
mesh of ``fsdp x tensor`` devices, rows of the batch over ``fsdp``. How weights come together is
left to the compiler, or the program says that each layer gathers its own over ``fsdp``. The
variants:

- floor: the frozen model, forward and backward; one vector that is added to the input is trained.
- lora: `jaxlora.lora` over it.
- nf4 floor, nf4: the two over weights of the layers in four bits.

Of each, for one device: the bytes of arguments and temporaries, as the compiler counts them, and
their share of its memory; operations; what collectives bring, loops in full; a bound on tokens a
second; and the seconds of tracing and compiling. The bound is the least of what the chip is sold
for, in operations and in bytes a second, and of the compiler's own seconds, where it tells them.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collectives
import jax
import jax.numpy as jnp
import llama
import models
import numpy as np
import optax
import peers
import report
import tpu
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlora
from jaxlora.planning import layout, operations

RANK = 16
FLOORS = {"lora": "floor", "nf4": "nf4 floor"}  # of each variant, the frozen model's step
COMPARED = ("tflops", "gb", "moved_gb", "collectives_gb", "tokens_per_s_at_most")
CHIPS = {  # operations a second, bytes a second, bytes of memory
    "v5e": (197e12, 819e9, 16 * 2**30),
    "v5p": (459e12, 2765e9, 95 * 2**30),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

    layers: int
    width: int
    hidden: int
    heads: int
    groups: int = 8
    vocabulary: int = 128256


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
        sizes: of the model.
        topology: chip and shape of the slice.
        fsdp: devices that each have other rows.
        tensor: devices with the same rows.
        batch: rows of all devices.
        tokens: tokens of a row.
        gathers: whether the program says that a layer gathers its weights over ``fsdp``.
    """

    sizes: Sizes
    topology: str
    fsdp: int
    tensor: int
    batch: int
    tokens: int = 2048
    gathers: bool = False

    @property
    def chip(self) -> str:
        """The generation of the chips."""
        return self.topology.partition(":")[0]


SMALL = Sizes(layers=32, width=4096, hidden=14336, heads=32)
LARGE = Sizes(layers=80, width=8192, hidden=28672, heads=64)
CASES = {
    "8B on v5e-16": Case(SMALL, "v5e:4x4", fsdp=4, tensor=4, batch=16),
    "70B on v5p-128": Case(LARGE, "v5p:4x4x4", fsdp=16, tensor=4, batch=32),
    "70B on v5e-256": Case(LARGE, "v5e:16x16", fsdp=32, tensor=8, batch=64),
}
CASES |= {f"{name}, gathered": dataclasses.replace(CASES[name], gathers=True) for name in CASES}
COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")  # what the tensor axis splits


def shapes(case: Case, mesh: Mesh, layers: int) -> Any:
    """Return the shapes of the parameters, each on its place in the mesh."""
    sizes = case.sizes
    d, f, v = sizes.width, sizes.hidden, sizes.vocabulary
    kv = d // sizes.heads * sizes.groups
    columns = dict(zip(COLUMNS, ((d, d), (d, kv), (d, kv), (d, f), (d, f)), strict=True))
    rows = dict(zip(ROWS, ((d, d), (f, d)), strict=True))

    def shape(sizes, *spec):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    stack: dict[str, Any] = {
        name: shape((layers, *size), None, "fsdp", "tensor") for name, size in columns.items()
    }
    stack |= {name: shape((layers, *size), None, "tensor", "fsdp") for name, size in rows.items()}
    stack |= {name: shape((layers, d)) for name in ("attention_norm", "norm")}
    return {
        "embed": shape((v, d), "tensor", "fsdp"),
        "layers": stack,
        "norm": shape((d,)),
        "head": shape((d, v), "fsdp", "tensor"),
    }


def layer(case: Case, place: Callable[..., jax.Array], x: jax.Array, w: Any) -> jax.Array:
    """Return the output of one layer, ``(batch, time, width)`` as x."""
    per_head = case.sizes.width // case.sizes.heads

    def heads(y):
        return y.reshape(*y.shape[:2], -1, per_head)

    h = llama.normed(x, w["attention_norm"])
    q, k, v = (heads(h @ w[name]) for name in "qkv")
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = place(x + h @ w["o"])
    h = llama.normed(x, w["norm"])
    h = place(jax.nn.silu(h @ w["gate"]) * (h @ w["up"]), "tensor")
    return place(x + h @ w["down"])


def forward(case: Case, mesh: Mesh, params: Any, tokens: jax.Array, vector: Any = 0) -> jax.Array:
    """Return logits ``(batch, time, vocabulary)`` for ids ``(batch, time)``."""

    def place(x, last=None):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp", None, last)))

    def gathered(w):
        """Return the weights of a layer, those of products on the devices of one fsdp index."""
        spec = dict.fromkeys(COLUMNS, P(None, "tensor")) | dict.fromkeys(ROWS, P("tensor", None))
        placed = {
            name: jax.lax.with_sharding_constraint(w[name], NamedSharding(mesh, spec[name]))
            for name in spec
        }
        return w | placed

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(x, w):
        return layer(case, place, x, gathered(w) if case.gathers else w), None

    x = place(params["embed"][tokens] + vector)
    x, _ = jax.lax.scan(body, x, params["layers"])
    return place(llama.normed(x, params["norm"]) @ params["head"], "tensor")


def variant(case: Case, mesh: Mesh, name: str, layers: int) -> peers.Variant:
    """Return the loss ``(trained, frozen, tokens, next ones)`` and the shapes of what it trains."""
    params = shapes(case, mesh, layers)
    fn = functools.partial(forward, case, mesh)
    tokens = jax.ShapeDtypeStruct((case.fsdp, 128), jnp.int32)

    def mean(logits, following):
        losses = optax.softmax_cross_entropy_with_integer_labels
        return losses(logits.astype(jnp.float32), following).mean()

    targets = tuple(f"layers/{name}" for name in COLUMNS + ROWS)
    apply, base = fn, params
    if name.startswith("nf4"):
        how = jaxlora.QuantizationConfig("nf4", targets=targets)
        base = layout.of_quantized(jaxlora.quantize(fn, params, tokens, config=how), params)
    if name != "floor":
        apply = jaxlora.lora(fn, strict=True)
    if name in FLOORS.values():
        everywhere = NamedSharding(mesh, P())
        vector = jax.ShapeDtypeStruct((case.sizes.width,), jnp.bfloat16, sharding=everywhere)
        return lambda v, p, x, y: mean(apply(p, x, v), y), vector, base
    config = jaxlora.LoRAConfig(rank=RANK, alpha=16, targets=targets)

    def adapted(base):
        return jaxlora.split(jaxlora.init(jax.random.key(0), fn, base, tokens, config=config))

    adapters = layout.of_factors(jax.eval_shape(adapted, base)[1], params, mesh)
    return lambda a, b, x, y: mean(apply(jaxlora.bind(b, a), x), y), adapters, base


def traced(case: Case, mesh: Mesh, name: str, layers: int) -> tuple[Any, Any]:
    """Return a training step, and the update alone of what it trains, traced for the slice."""
    loss, trained, frozen = variant(case, mesh, name, layers)
    tx = optax.adamw(1e-4)
    state = layout.of_state(jax.eval_shape(tx.init, trained), trained, mesh)
    rows = NamedSharding(mesh, P("fsdp"))
    tokens = jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32, sharding=rows)

    def update(trained, state, grads):
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    step = jax.jit(models.training_step(loss, tx), donate_argnums=(0, 1))
    alone = jax.jit(update, donate_argnums=(0, 1)).trace(trained, state, trained)
    return step.trace(trained, state, frozen, tokens, tokens), alone


def in_full(case: Case, once: dict[str, float], *outside: dict[str, float]) -> dict[str, float]:
    """Return the figures of a step of all layers, of which the compiler counts one.

    What is outside of the layers is taken off, and the rest is taken as often as there are layers:
    less than it is, where a layer has loops of its own.
    """
    rest = {key: sum(part[key] for part in outside) for key in once}
    return {key: rest[key] + case.sizes.layers * (once[key] - rest[key]) for key in once}


def mesh_of(case: Case) -> Mesh:
    """Return the devices of the slice, which is not there."""
    topology = topologies.get_topology_desc(case.topology, "tpu")
    devices = np.array(topology.devices).reshape(case.fsdp, case.tensor)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def told(case: Case, mesh: Mesh, name: str, without_layers: dict[str, float]) -> dict[str, float]:
    """Return the figures of a step, of each device.

    Args:
        case: the model and the slice.
        mesh: its devices.
        name: of the variant.
        without_layers: what the compiler tells of a step of the frozen model that has none.
    """
    begun = time.perf_counter()
    step, update = traced(case, mesh, name, case.sizes.layers)
    program = step.lower().compile()
    took = time.perf_counter() - begun
    once = tpu.figures(program)
    flops = operations.count(step.jaxpr, "tpu") / mesh.size
    rate, traffic, memory = CHIPS[case.chip]
    row = {"argument_gb": once["argument_gb"], "temp_gb": once["temp_gb"]}
    row["of_memory"] = (once["argument_gb"] + once["temp_gb"]) * 1e9 / memory
    whole = in_full(case, once, without_layers, tpu.figures(update.lower().compile()))
    row |= {"tflops": flops / 1e12, "gb": whole["gb"], "best_ms": whole["best_ms"]}
    row |= collectives.count(program.as_text())
    bounds = flops / rate, whole["gb"] * 1e9 / traffic, whole["best_ms"] / 1e3
    row["tokens_per_s_at_most"] = case.batch * case.tokens / np.nanmax(bounds)
    return row | {"trace_and_compile_s": took}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of each variant of each case and of its floor, and ratios to that."""
    rows: dict[str, dict[str, float]] = {}
    for name in options.cases:
        case, found = CASES[name], dict[str, dict[str, float]]()
        mesh = mesh_of(case)
        without_layers = tpu.figures(traced(case, mesh, "floor", 0)[0].lower().compile())
        for kind in [kind for variant in options.variants for kind in (FLOORS[variant], variant)]:
            row = found[kind] = told(case, mesh, kind, without_layers)
            floor = found[FLOORS.get(kind, kind)]
            ratios = {f"{key}_over_floor": row[key] / floor[key] for key in COMPARED}
            row = rows[f"{name}: {kind}"] = row | ratios
            shown = ", ".join(f"{key} {value:.3f}" for key, value in row.items())
            print(f"{name}: {kind}: {shown}", flush=True)
            report.write(options, rows, "compiled for TPU")
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    add("--variants", nargs="+", choices=FLOORS, default=list(FLOORS))
    add("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    tpu.need_no_tpu()
    measure(options)


if __name__ == "__main__":
    main()
