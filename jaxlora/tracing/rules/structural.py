"""Rules for operations that only reshape or convert a weight.

Each runs the program's own operation on the base and does to the factors what that means for
the pieces they carry. What comes out is a low-rank weight again.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing.interpreter import Evaluation, rule
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.lowrank import CARRIES, LowRank, Role


@rule("convert_element_type", "reduce_precision")
def convert(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Convert the base; the factors keep their dtype until a product needs them."""
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return run.without_rule(eqn, [weight], "the result is not floating")
    return [weight.replace(base=deferred.bind(eqn, [weight.base]))]


@rule("copy", "copy_p", "name")
def keep(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Do to the base what changes no value."""
    return [weight.replace(base=deferred.bind(eqn, [weight.base]))]


@rule("stop_gradient")
def stop_gradient(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Stop the gradient of the factors too."""
    return [jax.tree.map(lax.stop_gradient, weight)]


@rule("select_n")
def select(run: Evaluation, eqn: Any, which: Any, *cases: Any) -> list[Any]:
    """Select between one weight and itself, as a ``cond`` under `jax.vmap` does.

    One that differs in what it gives a gradient to is another. By one predicate for all of it or
    for each entry of a stack, each factor is selected as the base is.
    """
    if len({run.values.get(atom, atom) for atom in eqn.invars[1:]}) == 1:
        return [cases[0]]
    along = run.varying.get(eqn.invars[0], ())
    if len({*map(_factors_of, cases)}) > 1 or not _is_whole(cases[0], along):
        return run.without_rule(eqn, [which, *cases], "it selects between different values")
    base = deferred.lazily(lax.select_n, which, *(case.base for case in cases))
    weights = [case if case.is_probe else case.unrepeated(along) for case in cases]
    weight = weights[0]
    selected = {"base": base}
    first = tuple(slice(None) if d in along else slice(1) for d in range(jnp.ndim(which)))
    for name in CARRIES:
        if (factor := getattr(weight, name)) is not None:
            own = weight.beside(name, jnp.asarray(which)[first], along)
            factors = (getattr(other, name) for other in weights)
            selected[name] = lax.select_n(jnp.broadcast_to(own, factor.shape), *factors)
    return [weight.replace(**selected)]


def _factors_of(case: Any) -> Any:
    """Return what must be equal of weights for their factors to be selected between."""
    return jax.tree.structure(case.replace(base=None)) if isinstance(case, LowRank) else None


def _is_whole(weight: LowRank, along: Sequence[int]) -> bool:
    """Tell whether what varies along some dimensions is one for each entry or copy of a weight."""
    if weight.is_probe:  # for which nothing is a stack yet
        return len(along) < len(weight.dims)
    return weight.labels(*along) <= {Role.STACK, axes.REPEATED}


@rule("optimization_barrier", passes=True)
def optimization_barrier(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Put the bases and the factors behind one barrier."""
    return list(lax.optimization_barrier(values))


@rule("transpose")
def transpose(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Permute the dimensions."""
    return [weight.transposed(deferred.bind(eqn, [weight.base]), eqn.params["permutation"])]


@rule("reshape")
def reshape(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Split and join dimensions."""
    if (order := eqn.params["dimensions"]) is not None:  # as a vmapped convolution has it
        turned = deferred.lazily(lambda base: base.transpose(order), weight.base)
        weight = weight.transposed(turned, order)
    dims = axes.reshape(weight.dims, eqn.params["new_sizes"])
    if dims is None:
        return run.without_rule(eqn, [weight], "the reshape cuts an axis unevenly")
    sizes, sharding = eqn.params["new_sizes"], eqn.params["sharding"]
    base = deferred.lazily(lambda x: lax.reshape(x, sizes, out_sharding=sharding), weight.base)
    return [weight.reshaped(base, dims)]


@rule("squeeze")
def squeeze(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Drop dimensions of size 1."""
    gone = eqn.params["dimensions"]
    dims = tuple(dim for d, dim in enumerate(weight.dims) if d not in gone)
    return [weight.replace(base=deferred.bind(eqn, [weight.base]), dims=dims)]


@rule("broadcast_in_dim")
def broadcast(run: Evaluation, eqn: Any, weight: LowRank, *sizes: Any) -> list[Any]:
    """Add dimensions, and repeat the weight along those longer than 1."""
    if weight.is_rows() or sizes:
        return run.without_rule(eqn, [weight, *sizes], "it repeats rows")
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims = [_repeated(weight, size) for size in shape]
    for d, dim, size in zip(kept, weight.dims, weight.base.shape, strict=True):
        dims[d] = dim if size == shape[d] else _joined(weight, dims[d], dim)
    return [weight.replace(base=deferred.bind(eqn, [weight.base]), dims=tuple(dims))]


@rule("tile")
def tile(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Repeat the weight along its dimensions."""
    dims = tuple(
        _joined(weight, _repeated(weight, count), dim)
        for dim, count in zip(weight.dims, eqn.params["reps"], strict=True)
    )
    return [weight.replace(base=deferred.bind(eqn, [weight.base]), dims=dims)]


def _repeated(weight: LowRank, size: int) -> axes.Dim:
    """Return a dimension along which a weight repeats, which no factor carries."""
    return ((frozenset() if weight.is_probe else axes.REPEATED, size),) if size != 1 else ()


def _joined(weight: LowRank, major: axes.Dim, minor: axes.Dim) -> axes.Dim:
    return axes.merge((major + minor,))[0] if weight.is_probe else major + minor


@rule("rev")
def rev(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Reverse dimensions, one after the other."""
    if any(len(weight.dims[d]) > 1 for d in eqn.params["dimensions"]):
        return run.without_rule(eqn, [weight], "it reverses a dimension of several axes")
    for d in eqn.params["dimensions"]:
        if weight.dims[d]:
            weight = weight.along(d, lambda x, axis: lax.rev(x, (axis,)))
    return [weight]
