"""Where weights enter a program and leave it: nodes of a tree outside, low-rank values inside."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.tracing.evaluator import Evaluator
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.weight import Origin, Role
from jaxlora.weights import blocks, magnitude
from jaxlora.weights.adapters import Adapter
from jaxlora.weights.nodes import LoRAWeight
from jaxlora.weights.quantized import QuantizedWeight
from jaxlora.weights.roles import Roles


def enter(
    evaluator: Evaluator, path: str, weight: LoRAWeight | QuantizedWeight
) -> LowRank | Deferred:
    """Return the traced value of a weight that is adapted or quantized; the base gets no gradient.

    Factors of parts are those of the whole with zeros around them, and adapters of several parts
    are one, joined by rank.
    """
    if isinstance(weight, QuantizedWeight):
        return Deferred.from_quantized(weight)
    roles, shape = weight.roles, tuple(weight.shape)
    stack, in_side, out_side = roles.stack, (*roles.stack, *roles.in_), (*roles.stack, *roles.out)
    terms, factors = weight.terms, [jnp.moveaxis(term.b, len(stack), -1) for term in weight.terms]
    a, b, alpha = terms[0].a, factors[0], terms[0].alpha
    if terms[0].block is not None:
        a = jnp.concatenate([_whole(term, term.a, in_side) for term in terms], -1)
        scaled = [b * term.scaling for term, b in zip(terms, factors, strict=True)]
        b = [_whole(term, b, out_side) for term, b in zip(terms, scaled, strict=True)]
        b, alpha = jnp.concatenate(b, -1), a.shape[-1]
    keys, base = weight.dropout_keys, weight.base
    is_quantized = isinstance(base, QuantizedWeight)
    value = LowRank(
        base=Deferred.from_quantized(base) if is_quantized else jax.lax.stop_gradient(base),
        a=_to_axis_order(a, in_side, shape),
        b=_to_axis_order(b, out_side, shape),
        keys=None if keys is None else _to_axis_order(keys, stack, shape),
        dims=axes.from_shape(shape, roles.labels(Role.STACK, Role.IN, Role.OUT)),
        origin=Origin((path,), roles, shape, alpha, weight.dropout_rate),
    )
    if not weight.has_magnitude:
        return value
    with evaluator.scope(value):
        return value.replace(gain=_to_axis_order(magnitude.gain(weight), out_side, shape))


def _whole(term: Adapter, factor: jax.Array, axes_of: Sequence[int]) -> jax.Array:
    """Return a factor with the rank last, with zeros outside of the block that it is for."""
    around = blocks.padding(term.block, term.shape)
    return jnp.pad(factor, [*(around[axis] for axis in axes_of), (0, 0)])


def leave(weight: LowRank) -> LoRAWeight | None:
    """Return the node for a weight that leaves the program, or None where a node cannot say it."""
    repeats = axes.REPEATED in axes.labels(weight.dims)
    if weight.gain is not None:  # its magnitude was divided by a norm
        return None
    if weight.is_rows() or repeats or any(len(dim) > 1 for dim in weight.dims):
        return None
    shape, origin = weight.base.shape, weight.origin
    known = [Role.OUT] * len(shape)
    if origin.roles is not None and shape == origin.shape:
        known = origin.roles.labels(*Role)
    labels = [dim[0][0] if dim else label for dim, label in zip(weight.dims, known, strict=True)]
    roles = Roles(*(tuple(i for i, label in enumerate(labels) if label == role) for role in Role))
    b = _to_role_order(weight.b, (*roles.stack, *roles.out), shape)
    keys = weight.keys
    term = Adapter(
        a=_to_role_order(weight.a, (*roles.stack, *roles.in_), shape),
        b=jnp.moveaxis(b, -1, len(roles.stack)),
        roles=roles,
        alpha=origin.alpha,
        shape=tuple(shape),
    )
    return LoRAWeight(
        deferred.leave(weight.base),
        (term,),
        dropout_keys=None if keys is None else _to_role_order(keys, roles.stack, shape),
        dropout_rate=origin.dropout_rate,
    )


def _to_axis_order(factor: jax.Array, axes_of: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Sort the leading axes of a factor by the weight's axes, and drop those of size 1."""
    order = sorted(range(len(axes_of)), key=axes_of.__getitem__)
    if order != list(range(len(order))):
        factor = factor.transpose(*order, *range(len(order), factor.ndim))
    sizes = [shape[i] for i in sorted(axes_of) if shape[i] != 1]
    if len(sizes) == len(order):
        return factor
    return factor.reshape(*sizes, *factor.shape[len(order) :])


def _to_role_order(factor: jax.Array, axes_of: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Undo `_to_axis_order`."""
    in_order = sorted(axes_of)
    dropped = sum(shape[i] == 1 for i in in_order)
    sizes = [shape[i] for i in in_order]
    factor = factor.reshape(*sizes, *factor.shape[len(in_order) - dropped :])
    order = [in_order.index(i) for i in axes_of]
    return factor.transpose(*order, *range(len(order), factor.ndim))
