"""Bases that an initializer has changed: the first product is taken out of them.

A start from the weight itself (`jaxlora.initializers.FromWeight`) leaves ``W - scaling * a0 b0`` as
the base. What is trained is for that base alone, until `jaxlora.algebra.rebase` turns it into an
adapter of the weight as it was.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxlora.initializers.from_weight import FromWeight
from jaxlora.linalg import matrices
from jaxlora.types import Function, Leaf
from jaxlora.weights import blocks, memory, paths, placed, quantized
from jaxlora.weights.adapters import Adapter, merge_dtype, scaling
from jaxlora.weights.quantized import QuantizedWeight
from jaxlora.weights.roles import Roles, factor_axes
from jaxlora.weights.target import Target


class _How(NamedTuple):
    """What has to be known to take a product out of a weight."""

    factors: Function
    block: blocks.Part | None
    rank: int
    alpha: float
    roles: Roles
    dtype: DTypeLike


def take_out(
    key: jax.Array,
    target: Target,
    base: Leaf,
    roles: Roles,
    initializer: FromWeight,
    dtype: DTypeLike,
) -> tuple[Leaf, Adapter]:
    """Return what an adapter that starts from a weight leaves of it, and the adapter.

    Args:
        key: random key.
        target: the weight or part of it.
        base: the weight.
        roles: roles of its axes.
        initializer: makes the factors.
        dtype: dtype of the factors.

    Raises:
        ValueError: the weight is the shape of one, or is not finite; the initializer makes factors
            of other shapes.
    """
    name = target.name
    if not hasattr(quantized.stand_in(base), "__array__"):
        raise ValueError(f"{initializer.name!r} starts from values: {name!r} is {base}")
    if isinstance(base, QuantizedWeight) and initializer.changes_base:
        raise ValueError(
            f"{initializer.name!r} takes its product out of the weight, and {name!r} is quantized: "
            "start from the float weights and quantize what that leaves"
        )
    how = _How(initializer.factors, *target[1:], roles, dtype)
    shape = blocks.shape(target.block, base.shape)
    data = _data(name, initializer, math.prod(roles.sizes(shape)[0]))
    _check_factors(name, initializer.name, how, shape, data)
    axes = (tuple(range(base.ndim)), *factor_axes(roles, target.block)[:2], ())
    left, a, b, finite = placed.run(_taken_out, how, (key, base, data), base, axes)
    if not isinstance(finite, Tracer) and not finite:
        raise ValueError(f"{initializer.name!r} needs finite values: {name!r} holds NaN or inf")
    term = Adapter(a, b, roles, target.alpha, tuple(base.shape), block=target.block)
    if not initializer.changes_base:
        return base, term
    return memory.beside(base, left), dataclasses.replace(term, changed=initializer.name)


def _data(name: str, initializer: FromWeight, entries: int) -> tuple[jax.Array, ...]:
    """Return what the initializer gets for a target, or nothing where it needs nothing."""
    if initializer.data is None:
        return ()
    if name not in initializer.data:
        near = paths.nearest(name, initializer.data)
        raise ValueError(f"{initializer.name!r} has no data for the target {name!r}; {near}")
    found = initializer.data[name]
    if len(found) != entries:
        raise ValueError(
            f"the data for {name!r} must be a matrix for each of {entries} entries of its stack: "
            f"got shape {found.shape}"
        )
    return (found,)


def _check_factors(
    name: str, initializer: str, how: _How, shape: tuple[int, ...], data: tuple[jax.Array, ...]
) -> None:
    """Raise if the initializer makes factors of other shapes for a weight of this shape."""
    _, *sides = (math.prod(sizes) for sizes in how.roles.sizes(shape))
    weight = jax.ShapeDtypeStruct(tuple(sides), jnp.float32)
    made = jax.eval_shape(
        lambda w, *data: how.factors(
            jax.random.key(0), w, how.rank, scaling(how.alpha, how.rank), *data
        ),
        weight,
        *(x[0] for x in data),
    )
    wanted = [(sides[0], how.rank), (how.rank, sides[1])]
    if (got := [x.shape for x in made]) != wanted:
        raise ValueError(
            f"{initializer!r} must return a and b of the shapes {wanted} for {name!r}: got {got}"
        )


def _taken_out(
    key: jax.Array, weight: jax.Array, data: tuple[jax.Array, ...], how: _How
) -> tuple[jax.Array, ...]:
    """Return what is left of a weight, the factors, and whether all are finite."""
    factors, block, rank, alpha, roles, dtype = how
    weight = quantized.values(weight)
    cut = weight[blocks.slices(block)]
    each = matrices.of_weight(cut, roles)
    scale = scaling(alpha, rank)
    a, b = jax.vmap(lambda key, w, *data: factors(key, w, rank, scale, *data))(
        jax.random.split(key, len(each)), each, *data
    )
    shapes = roles.factor_shapes(cut.shape, rank)
    a, b = (x.reshape(shape).astype(dtype) for x, shape in zip((a, b), shapes, strict=True))
    term = Adapter(a, b, roles, alpha, tuple(weight.shape), block=block)
    left = (weight.astype(merge_dtype(weight.dtype)) - term.delta(weight)).astype(weight.dtype)
    return left, a, b, jnp.isfinite(left).all()
