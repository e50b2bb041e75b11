"""The magnitude of an adapted weight, which DoRA trains beside the factors.

Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353) has a magnitude ``m`` for
each column of a weight, of shape ``(*stack, *out)``. With the norm over the in axes::

    W = m * V / norm(V)    where    V = base + scaling * a b

No gradient goes through the norm (section 4.3).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.types import Leaf
from jaxlora.weights import blocks, memory, quantized, sharding
from jaxlora.weights.adapters import Adapter, merge_dtype
from jaxlora.weights.nodes import LoRAWeight
from jaxlora.weights.quantized import QuantizedWeight
from jaxlora.weights.roles import Roles


def norms(base: Leaf, term: Adapter) -> jax.Array:
    """Return the norm of each column of ``base + scaling * a b``, which is not kept.

    A column of it has the squared norm ``|w|² + 2 s (w^T a) b + s² b^T (a^T a) b``, with products
    of the size of the rank alone. That reads the base twice. On TPU the sum is squared as it is
    made: there the compiler makes one operation of the product, the sum and the norm.

    Args:
        base: the weight.
        term: factors of all of it, or of a part that has all of its in axes.

    Returns:
        Array ``(*stack, *out)`` of what the factors are for, float32 or wider.
    """
    base = quantized.part_of(base, term.block)
    return _norms(LoRAWeight(base, (dataclasses.replace(term, block=None),)))


def _norms(weight: LoRAWeight) -> jax.Array:
    """Return the norms of the columns of a weight whose only term is for all of it."""
    roles, dtype = weight.roles, merge_dtype(weight.dtype)
    is_made = isinstance(weight.base, QuantizedWeight) or memory.is_on_host(weight.base)
    if is_made and 0 in roles.stack:  # one entry at a time
        return jax.lax.map(lambda entry: _norms(_entry(entry, roles)), weight)
    base = quantized.values(memory.on_device(weight.base))
    base, a, b = (x.astype(dtype) for x in (base, weight.a, weight.b))
    ndim = len(weight.shape)
    rank, other = ndim, ndim + 1  # the next free names of axes
    columns = (*roles.stack, *roles.out)
    names = {"a": (*roles.stack, *roles.in_, rank), "b": (*roles.stack, rank, *roles.out)}
    typed = sharding.explicit(weight.base)

    def product(x, x_names, y, y_names, out):
        kept = [None if name >= rank else name for name in out]
        placed = None if typed is None else sharding.along(typed, tuple(kept))
        how: Any = {"precision": jax.lax.Precision.HIGHEST, "out_sharding": placed}
        return jnp.einsum(x, [*x_names], y, [*y_names], [*out], **how)

    def squared(weight):
        sums = jnp.square(weight).sum(roles.in_)
        return sums.transpose([sorted(columns).index(axis) for axis in columns])

    def by_factors(base, a, b):
        crossed = product(a, names["a"], base, range(ndim), names["b"])
        gram = product(a, names["a"], a, (*names["a"][:-1], other), (*roles.stack, rank, other))
        of_b = product(
            gram, (*roles.stack, other, rank), b, names["b"], (*roles.stack, other, *roles.out)
        )
        summed = (2 * weight.scaling * crossed + weight.scaling**2 * of_b) * b
        return jnp.maximum(squared(base) + summed.sum(len(roles.stack)), 0)

    def fused(base, a, b):
        delta = product(a, names["a"], b, names["b"], range(ndim))
        return squared(base + weight.scaling * delta)

    return jnp.sqrt(jax.lax.platform_dependent(base, a, b, tpu=fused, default=by_factors))


def _entry(weight: LoRAWeight, roles: Roles) -> LoRAWeight:
    """Return one entry along the first axis, a stack, of a weight of these roles."""
    left = (
        tuple(axis - 1 for axis in group if axis) for group in (roles.stack, roles.in_, roles.out)
    )
    return LoRAWeight(weight.base, (dataclasses.replace(weight.term, roles=Roles(*left)),))


def gain(weight: LoRAWeight) -> jax.Array:
    """Return ``m / norm(V)``, ``(*stack, *out)``, 1 where a column is zero or has no magnitude.

    Args:
        weight: a weight, of which a term has a magnitude.
    """
    with_magnitude = (term for term in weight.terms if term.magnitude is not None)
    gains = [_own_gain(weight.base, term) for term in with_magnitude]
    return functools.reduce(jnp.multiply, gains)  # no column is in two of them


def _own_gain(base: Leaf, term: Adapter) -> jax.Array:
    """Return the gain of one term, 1 in the columns that it is not for."""
    norm = norms(*jax.lax.stop_gradient((base, term)))
    magnitude = term.magnitude.astype(norm.dtype)
    own = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)
    around = blocks.padding(term.block, base.shape)
    columns = (*term.roles.stack, *term.roles.out)
    return jnp.pad(own, [around[axis] for axis in columns], constant_values=1)


def merged(weight: LoRAWeight) -> jax.Array:
    """Return the weight in effect, ``base + delta`` times its gain, in float32 or wider."""
    total = quantized.values(weight.base).astype(merge_dtype(weight.dtype)) + weight.delta()
    if not weight.has_magnitude:
        return total
    roles, factor = weight.roles, gain(weight)
    columns = (*roles.stack, *roles.out)
    factor = factor.transpose([columns.index(axis) for axis in sorted(columns)])
    return total * jnp.expand_dims(factor, roles.in_)
