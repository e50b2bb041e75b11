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

With `--at-once` the compiler sends together what is gathered in one place and smaller than so many
bytes, as the factors of a layer are.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import collectives
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import peers
import report
import tpu
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from slices import CASES, COLUMNS, ROWS, Case, forward, mesh_of, shapes

import jaxlora
from jaxlora.planning import layout, operations

RANK = 16
FLOORS = {"lora": "floor", "nf4": "nf4 floor"}  # of each variant, the frozen model's step
AT_ONCE = "xla_all_gather_latency_bound_threshold_in_bytes"
COMPARED = ("tflops", "gb", "moved_gb", "collectives_gb", "tokens_per_s_at_most")
CHIPS = {  # operations a second, bytes a second, bytes of memory
    "v5e": (197e12, 819e9, 16 * 2**30),
    "v5p": (459e12, 2765e9, 95 * 2**30),
}


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

    update = functools.partial(models.update, tx)
    step = jax.jit(models.training_step(loss, tx), donate_argnums=(0, 1))
    alone = jax.jit(update, donate_argnums=(0, 1)).trace(trained, state, trained)
    return step.trace(trained, state, frozen, tokens, tokens), alone


def told(
    case: Case,
    mesh: Mesh,
    name: str,
    without_layers: dict[str, float],
    compiler_options: dict[str, str],
) -> dict[str, float]:
    """Return the figures of a step, of each device.

    Args:
        case: the model and the slice.
        mesh: its devices.
        name: of the variant.
        without_layers: what the compiler tells of a step of the frozen model that has none.
        compiler_options: what the compiler of the step is told.
    """
    begun = time.perf_counter()
    step, update = traced(case, mesh, name, case.sizes.layers)
    program = step.lower().compile(compiler_options)
    took = time.perf_counter() - begun
    once = tpu.figures(program)
    flops = operations.count(step.jaxpr, "tpu") / mesh.size
    rate, traffic, memory = CHIPS[case.chip]
    row = {"argument_gb": once["argument_gb"], "temp_gb": once["temp_gb"]}
    row["of_memory"] = (once["argument_gb"] + once["temp_gb"]) * 1e9 / memory
    outside = without_layers, tpu.figures(update.lower().compile())
    whole = tpu.in_full(case.sizes.layers, once, *outside)
    row |= {"tflops": flops / 1e12, "gb": whole["gb"], "best_ms": whole["best_ms"]}
    row |= collectives.count(program.as_text())
    bounds = flops / rate, whole["gb"] * 1e9 / traffic, whole["best_ms"] / 1e3
    row["tokens_per_s_at_most"] = case.batch * case.tokens / np.nanmax(bounds)
    return row | {"trace_and_compile_s": took}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the figures of each variant of each case and of its floor, and ratios to that."""
    rows: dict[str, dict[str, float]] = {}
    settings = {AT_ONCE: str(options.at_once)} if options.at_once else {}
    for name in options.cases:
        case, found = CASES[name], dict[str, dict[str, float]]()
        mesh = mesh_of(case)
        without_layers = tpu.figures(traced(case, mesh, "floor", 0)[0].lower().compile())
        for kind in [kind for variant in options.variants for kind in (FLOORS[variant], variant)]:
            row = found[kind] = told(case, mesh, kind, without_layers, settings)
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
    add("--at-once", type=int, metavar="BYTES", help="of what is gathered together")
    add("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    tpu.need_no_tpu()
    measure(options)


if __name__ == "__main__":
    main()
