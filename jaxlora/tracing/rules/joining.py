"""Rules for putting several weights together: adding, stacking and concatenating.

Weights side by side along an axis are one low-rank weight whose rank is the sum of theirs::

    [W1 + a1 b1, W2 + a2 b2] = [W1, W2] + [a1, a2] [[b1, 0], [0, b2]]
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.registry import rule
from jaxlora.tracing.rules.arithmetic import elementwise, padded
from jaxlora.tracing.types import Base, Eqn, Operand, Values
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.lowrank import CARRIES, LowRank
from jaxlora.tracing.values.probe import Probe
from jaxlora.tracing.values.weight import Origin, Role, W, Weight, base_of
from jaxlora.weights.adapters import merge_dtype


@rule("add", "sub", "add_any", flops=elementwise)
def add(run: Evaluation, eqn: Eqn, x: Operand, y: Operand) -> Values:
    """Add what is no weight to the base, and to a weight another of the same axes."""
    weights = [value for value in (x, y) if isinstance(value, Weight)]
    shape = compat.shape(eqn.outvars[0])
    if any(weight.is_rows() or weight.shape != shape for weight in weights):
        return run.without_rule(eqn, [x, y], "it is added to what is no weight")
    if eqn.primitive.name == "sub" and isinstance(y, Weight):
        return _joined(run, eqn, [x, y], [x, y.negated()], None)
    return _joined(run, eqn, [x, y], [x, y], None)


@rule("stack")
def stack(run: Evaluation, eqn: Eqn, *values: Operand) -> Values:
    """Put weights on top of each other along a new axis."""
    axis = eqn.params["axis"]

    def expanded(value):
        base = deferred.lazily(lambda x: jnp.expand_dims(x, axis), base_of(value))
        if not isinstance(value, Weight):
            return base
        dims = (*value.dims[:axis], (), *value.dims[axis:])
        return value.replace(base=base, dims=dims)

    return _joined(run, eqn, values, [expanded(value) for value in values], axis)


@rule("concatenate")
def concatenate(run: Evaluation, eqn: Eqn, *values: Operand) -> Values:
    """Put weights side by side along an axis; what has no size along it adds nothing."""
    axis = eqn.params["dimension"]
    parts = [value for value in values if value.shape[axis] != 0]
    return parts if len(parts) == 1 else _joined(run, eqn, values, parts, axis)


def _joined(run: Evaluation, eqn: Eqn, values: Values, parts: Values, axis: int | None) -> Values:
    """Return one weight for parts along an axis, or for a sum, or an array where none can be."""
    probes = [part for part in parts if isinstance(part, Probe)]
    weights = [part for part in parts if isinstance(part, LowRank)]
    reason = _probes_obstacle(parts, probes, axis) if probes else _obstacle(weights, axis)
    if reason:
        return run.without_rule(eqn, values, reason)
    base = deferred.bind(eqn, [base_of(value) for value in values])
    if probes:
        return [_joined_probes(_with_bookkeeping(probes, base), probes, axis)]
    return [_joined_weights(_with_bookkeeping(weights, base), parts, axis)]


def _with_bookkeeping(weights: Sequence[W], base: Base) -> W:
    """Return the first of some weights with another base, and what is known of all."""
    paths = dict.fromkeys(path for weight in weights for path in weight.origin.paths)
    numbers = tuple(number for weight in weights for number in weight.origin.numbers)
    rate = weights[0].origin.dropout_rate
    return weights[0].replace(
        base=base,
        origin=Origin(tuple(paths), dropout_rate=rate, numbers=numbers),
        indexed=frozenset().union(*(weight.indexed for weight in weights)),
        windows=frozenset().union(*(weight.windows for weight in weights)),
    )


def _probes_obstacle(parts: Values, weights: Sequence[Probe], axis: int | None) -> str:
    """Return why parts cannot be one weight, as far as a probe can know, or nothing."""
    if len(weights) < len(parts):
        return "it is joined to what is no weight"
    others = [list(weight.dims) for weight in weights]
    if axis is not None and any(len(dims.pop(axis)) > 1 for dims in others):
        return "it is joined along a dimension of several axes"
    sizes = [[[size for _, size in dim] for dim in dims] for dims in others]
    return (
        "" if all(own == sizes[0] for own in sizes) else "it is joined to a weight with other roles"
    )


def _joined_probes(first: Probe, weights: Sequence[Probe], axis: int | None) -> Probe:
    """Return the first of some probes with the axes of all."""
    dims = [_union([weight.dims[d] for weight in weights]) for d in range(first.base.ndim)]
    if axis is not None:
        joined = frozenset().union(*(weight.labels(axis) for weight in weights))
        dims[axis] = ((joined, first.base.shape[axis]),)
    scanned = frozenset().union(*(weight.scanned for weight in weights))
    return first.replace(dims=tuple(dims), scanned=scanned)


def _union(dims: Sequence[axes.Dim]) -> axes.Dim:
    """Return a probe's dimension with the labels of all."""
    pieces = zip(*dims, strict=True)
    return tuple((frozenset().union(*(label for label, _ in p)), p[0][1]) for p in pieces)


def _obstacle(weights: Sequence[LowRank], axis: int | None) -> str:
    """Return why weights cannot be one, or nothing."""
    if any(weight.gain is not None for weight in weights):
        return "it has a magnitude, and what it is joined to another"
    others, labels = [list(weight.dims) for weight in weights], frozenset()
    if axis is not None:
        if any(len(dims.pop(axis)) > 1 for dims in others):
            return "it is joined along a dimension of several axes"
        labels = labels.union(*(weight.labels(axis) for weight in weights))
    if any(dims != others[0] for dims in others) or len(labels) > 1 or axes.REPEATED in labels:
        return "it is joined to a weight with other roles"
    if len({(weight.origin.dropout_rate, weight.keys is None) for weight in weights}) > 1:
        return "it is joined to a weight with another dropout"
    return ""


def _joined_weights(first: LowRank, parts: Values, axis: int | None) -> LowRank:
    """Return the first of some weights with the factors of all; plain parts have zero factors."""
    label, dims = None, first.dims
    if axis is not None:
        weights = (part for part in parts if isinstance(part, LowRank))
        label = next((label for w in weights for label in w.labels(axis)), Role.STACK)
        dims = (*dims[:axis], ((label, first.base.shape[axis]),), *dims[axis + 1 :])
    a, b = (_joined_factors(parts, name, label, axis) for name in ("a", "b"))
    keys = first.keys
    if keys is not None:  # joined weights drop the same elements of what is their one input
        sizes = [size for piece, size in axes.pieces(dims) if piece == Role.STACK]
        keys = jnp.broadcast_to(keys.reshape(-1)[0], sizes)
    origin = dataclasses.replace(first.origin, alpha=a.shape[-1])
    return first.replace(a=a, b=b, keys=keys, dims=dims, origin=origin)


def _joined_factors(parts: Values, name: str, label: Role | None, axis: int | None) -> jax.Array:
    """Return ``a`` or ``b`` of all parts: by rank, but along a stack each entry has its own."""
    sizes = [0 if axis is None else base_of(part).shape[axis] for part in parts]
    starts = [0, *itertools.accumulate(sizes)]
    ranks = [part.a.shape[-1] if isinstance(part, LowRank) else 0 for part in parts]
    factors = []
    for part, size, start, rank in zip(parts, sizes, starts, ranks, strict=False):
        if not isinstance(part, LowRank):
            continue
        factor = getattr(part, name)
        if name == "b":
            factor = part.factors(merge_dtype(factor.dtype))[1]
        if axis is not None and label in CARRIES[name]:
            before = axes.pieces(part.dims[:axis])
            position = sum(piece in CARRIES[name] for piece, _ in before)
            factor = factor if part.dims[axis] else jnp.expand_dims(factor, position)
            factor = padded(factor, position, (start, starts[-1] - start - size, 0), 0)
        if label == Role.STACK:
            factor = padded(factor, factor.ndim - 1, (0, max(ranks) - rank, 0), 0)
        factors.append(factor)
    if label == Role.STACK:  # every entry is zero in all parts but its own
        return sum(factors[1:], factors[0])
    return jnp.concatenate(factors, axis=-1)
