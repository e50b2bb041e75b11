"""Rules for operations that only reshape or convert a weight.

Each runs the program's own operation on the base and does to the factors what that means for
the pieces they carry. What comes out is a low-rank weight again.
"""

import dataclasses
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Var
from jaxlora.tracing.registry import rule
from jaxlora.tracing.types import Eqn, Operand, Value, Values
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.weight import Weight


def _convert_deferred(eqn: Eqn, x: Deferred) -> Deferred:
    return x.astype(eqn.params["new_dtype"])


@rule("convert_element_type", deferred=_convert_deferred)
@rule("reduce_precision")
def convert(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Convert the base; the factors keep their dtype until a product needs them."""
    dtype = compat.dtype(eqn.outvars[0])
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return run.without_rule(eqn, [weight], "the result is not floating")
    return [weight.replace(base=deferred.bind(eqn, [weight.base]))]


@rule("copy", "copy_p", deferred=deferred.later)
@rule("name")
def keep(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Do to the base what changes no value."""
    return [weight.replace(base=deferred.bind(eqn, [weight.base]))]


@rule("stop_gradient", deferred=deferred.later)
def stop_gradient(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Stop the gradient of the factors too."""
    return [jax.tree.map(lax.stop_gradient, weight)]


@rule("select_n")
def select(run: Evaluation, eqn: Eqn, which: jax.Array, *cases: Operand) -> Values:
    """Select between one weight and itself, as a ``cond`` under `jax.vmap` does.

    One that differs in what it gives a gradient to is another. By one predicate for all of it or
    for each entry of a stack, each factor is selected as the base is.
    """
    predicate, *others = eqn.invars
    values = run.known.values
    if len({values.get(x, x) if isinstance(x, Var) else id(x) for x in others}) == 1:
        return [cases[0]]
    along = run.known.varying.get(predicate, ()) if isinstance(predicate, Var) else ()
    weights = [case for case in cases if isinstance(case, Weight)]
    is_one = len(weights) == len(cases) and len({*map(_factors_of, weights)}) == 1
    if not is_one or not weights[0].is_whole(along):
        return run.without_rule(eqn, [which, *cases], "it selects between different values")
    base = deferred.lazily(lax.select_n, which, *(weight.base for weight in weights))
    weights = [weight.unrepeated(along) for weight in weights]
    weight = weights[0]
    selected: dict[str, object] = {"base": base}
    first = tuple(slice(None) if d in along else slice(1) for d in range(jnp.ndim(which)))
    for name, factor in weight.arrays().items():
        own = weight.beside(name, jnp.asarray(which)[first], along)
        factors = (getattr(other, name) for other in weights)
        selected[name] = lax.select_n(jnp.broadcast_to(own, factor.shape), *factors)
    return [weight.replace(**selected)]


def _factors_of(weight: Weight) -> Hashable:
    """Return what must be equal of weights for their factors to be selected between."""
    return jax.tree.structure(weight.replace(base=None))


@rule("optimization_barrier", passes=True)
def optimization_barrier(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Put the bases and the factors behind one barrier."""
    return list(lax.optimization_barrier(values))


def _transpose_deferred(eqn: Eqn, x: Deferred) -> Deferred:
    return dataclasses.replace(x, order=tuple(x.order[dim] for dim in eqn.params["permutation"]))


@rule("transpose", deferred=_transpose_deferred)
def transpose(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Permute the dimensions."""
    return [weight.transposed(deferred.bind(eqn, [weight.base]), eqn.params["permutation"])]


@rule("reshape", deferred=deferred.later)
def reshape(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
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


def _squeeze_deferred(eqn: Eqn, x: Deferred) -> Deferred | None:
    gone = {x.order[dim] for dim in eqn.params["dimensions"]}
    if not x.is_aligned:
        return None
    kept = [axis for axis in x.order if axis not in gone]
    order = tuple(sorted(kept).index(axis) for axis in kept)
    return x.on_parts(lambda part: lax.squeeze(part, sorted(gone)), order)


@rule("squeeze", deferred=_squeeze_deferred)
def squeeze(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Drop dimensions of size 1."""
    gone = eqn.params["dimensions"]
    dims = tuple(dim for d, dim in enumerate(weight.dims) if d not in gone)
    return [weight.replace(base=deferred.bind(eqn, [weight.base]), dims=dims)]


@rule("broadcast_in_dim", deferred=deferred.later)
def broadcast(run: Evaluation, eqn: Eqn, weight: Weight, *sizes: jax.Array) -> Values:
    """Add dimensions, and repeat the weight along those longer than 1."""
    if weight.is_rows() or sizes:
        return run.without_rule(eqn, [weight, *sizes], "it repeats rows")
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims = [weight.repeated(size) for size in shape]
    for d, dim, size in zip(kept, weight.dims, weight.base.shape, strict=True):
        dims[d] = dim if size == shape[d] else weight.repeated(shape[d], dim)
    return [weight.replace(base=deferred.bind(eqn, [weight.base]), dims=tuple(dims))]


@rule("tile")
def tile(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Repeat the weight along its dimensions."""
    dims = tuple(
        weight.repeated(count, dim)
        for dim, count in zip(weight.dims, eqn.params["reps"], strict=True)
    )
    return [weight.replace(base=deferred.bind(eqn, [weight.base]), dims=dims)]


@rule("rev", deferred=deferred.later)
def rev(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Reverse dimensions, one after the other."""
    if any(len(weight.dims[d]) > 1 for d in eqn.params["dimensions"]):
        return run.without_rule(eqn, [weight], "it reverses a dimension of several axes")
    for d in eqn.params["dimensions"]:
        if weight.dims[d]:
            weight = weight.along(d, lambda x, axis: lax.rev(x, (axis,)))
    return [weight]
