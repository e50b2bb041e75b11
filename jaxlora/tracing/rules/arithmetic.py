"""Rules for arithmetic on weights: scaling, padding, and putting several together.

A scale along in axes scales ``a``, one along out axes scales ``b``. Weights side by side along
an axis are one low-rank weight whose rank is the sum of theirs, because::

    [W1 + a1 b1, W2 + a2 b2] = [W1, W2] + [a1, a2] [[b1, 0], [0, b2]]
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora.tracing.interpreter import Evaluation, rule
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.lowrank import CARRIES, LowRank, Origin, Role
from jaxlora.weights.adapters import merge_dtype, scaling


@rule("neg")
def negate(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Negate the base and ``b``."""
    base = deferred.lazily(lax.neg, weight.base)
    return [weight.replace(base=base, b=None if weight.is_probe else -weight.b)]


@rule("add", "sub", "add_any")
def add(run: Evaluation, eqn: Any, x: Any, y: Any) -> list[Any]:
    """Add what is no weight to the base, and to a weight another of the same axes."""
    weights = [value for value in (x, y) if isinstance(value, LowRank)]
    if any(
        weight.is_rows() or weight.base.shape != eqn.outvars[0].aval.shape for weight in weights
    ):
        return run.without_rule(eqn, [x, y], "it is added to what is no weight")
    is_negated = eqn.primitive.name == "sub" and isinstance(y, LowRank) and not y.is_probe
    parts = [x, y.replace(b=-y.b) if is_negated else y]
    return _joined(run, eqn, [x, y], parts, None)


@rule("mul", "div")
def scale(run: Evaluation, eqn: Any, x: Any, y: Any) -> list[Any]:
    """Scale a weight by a number, or by a vector along the axes of one factor."""
    is_division = eqn.primitive.name == "div"
    weight, vector = (x, y) if is_division or _size(x) >= _size(y) else (y, x)
    vector = run.densify(eqn, vector, "it scales another weight")
    if not isinstance(weight, LowRank):
        return compat.bind(eqn, [weight, vector] if weight is x else [vector, weight])
    values = [weight, vector] if weight is x else [vector, weight]
    along = [d for d, size in enumerate(jnp.shape(vector)) if size != 1]
    if jnp.size(vector) == weight.size > 1 or eqn.outvars[0].aval.shape != weight.base.shape:
        return run.without_rule(eqn, values, "it does not scale whole axes")
    base = deferred.bind(eqn, [getattr(value, "base", value) for value in values])
    if weight.is_probe:
        return [weight.replace(base=base)]
    for name in ("b", "a"):
        if weight.labels(*along) <= CARRIES[name]:
            factor = getattr(weight, name)
            vector = weight.beside(name, jnp.asarray(vector, factor.dtype), along)
            factor = factor / vector if is_division else factor * vector
            return [weight.replace(base=base, **{name: factor})]
    return run.without_rule(eqn, values, "it scales along axes of both factors")


def _size(x: Any) -> int:
    return x.size if isinstance(x, LowRank) else jnp.size(x) - 1  # of equals, the weight


@rule("reduce_sum")
def sum_(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Sum along axes of the factors; the entries of a stack become so many times the rank."""
    gone = eqn.params["axes"]
    kept = [d for d in range(len(weight.dims)) if d not in gone]
    sums_stack = Role.STACK in weight.labels(*gone)
    if sums_stack and weight.keys is not None:
        return run.without_rule(eqn, [weight], "it sums a stack that has dropout")
    if weight.gain is not None and weight.labels(*gone) & CARRIES["gain"]:
        return run.without_rule(eqn, [weight], "it sums columns that have magnitudes")
    base = deferred.bind(eqn, [weight.base])
    fields: dict[str, Any] = {"base": base, "dims": tuple(weight.dims[d] for d in kept)}
    if weight.is_probe:
        return [weight.replace(**fields)]
    weight = weight.transposed(weight.base, [*kept, *gone])
    summed_pieces = axes.pieces(weight.dims[len(kept) :])
    times = math.prod(size for label, size in summed_pieces if label is axes.REPEATED)
    weight = weight.replace(b=weight.b * times) if times != 1 else weight
    for name in ("a", "b"):
        factor, carries = getattr(weight, name), CARRIES[name]
        first = sum(label in carries for label, _ in axes.pieces(fields["dims"]))
        summed = [label for label, _ in summed_pieces if label in carries]
        own = tuple(first + i for i, label in enumerate(summed) if label != Role.STACK)
        fields[name] = factor.sum(own).reshape(*factor.shape[:first], -1)
    if sums_stack:
        alpha = scaling(weight.origin.alpha, weight.rank) * fields["a"].shape[-1]
        fields["origin"] = dataclasses.replace(weight.origin, roles=None, alpha=alpha)
    return [weight.replace(**fields)]


@rule("pad")
def pad(run: Evaluation, eqn: Any, weight: Any, filling: Any) -> list[Any]:
    """Pad the base as the program does, and the factors with zeros."""
    config = eqn.params["padding_config"]
    padded = [d for d, amounts in enumerate(config) if any(amounts)]
    if not isinstance(weight, LowRank) or any(len(weight.dims[d]) != 1 for d in padded):
        return run.without_rule(eqn, [weight, filling], "it pads what is not one axis")
    filling = run.densify(eqn, filling, "it is padded with")
    if weight.gain is not None and not (isinstance(filling, float | np.ndarray) and filling == 0):
        return run.without_rule(eqn, [weight, filling], "it has a magnitude, its padding none")
    for d in padded:
        base = deferred.lazily(
            lambda x, filling, d=d: _padded(x, d, config[d], filling), weight.base, filling
        )
        weight = weight.along(d, lambda x, axis, d=d: _padded(x, axis, config[d], 0), base=base)
    return [weight]


def _padded(x: Any, axis: int, amounts: Any, filling: Any) -> Any:
    config = [(0, 0, 0)] * x.ndim
    config[axis] = amounts
    return lax.pad(x, jnp.asarray(filling, x.dtype), config)


@rule("stack")
def stack(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Put weights on top of each other along a new axis."""
    axis = eqn.params["axis"]

    def expanded(value):
        base = deferred.lazily(lambda x: jnp.expand_dims(x, axis), getattr(value, "base", value))
        if not isinstance(value, LowRank):
            return base
        dims = (*value.dims[:axis], (), *value.dims[axis:])
        return value.replace(base=base, dims=dims)

    return _joined(run, eqn, values, [expanded(value) for value in values], axis)


@rule("concatenate")
def concatenate(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Put weights side by side along an axis; what has no size along it adds nothing."""
    axis = eqn.params["dimension"]
    parts = [value for value in values if value.shape[axis] != 0]
    return parts if len(parts) == 1 else _joined(run, eqn, values, parts, axis)


def _joined(
    run: Evaluation, eqn: Any, values: Sequence[Any], parts: Sequence[Any], axis: int | None
) -> list[Any]:
    """Return one weight for parts along an axis, or for a sum; plain parts have zero factors."""
    weights = [part for part in parts if isinstance(part, LowRank)]
    if reason := _obstacle(parts, weights, axis):
        return run.without_rule(eqn, values, reason)
    base = deferred.bind(eqn, [getattr(value, "base", value) for value in values])
    first = weights[0]
    origin = Origin(tuple(dict.fromkeys(path for w in weights for path in w.origin.paths)))
    books: dict[str, Any] = {
        name: frozenset().union(*(getattr(weight, name) for weight in weights))
        for name in ("indexed", "windows", "scanned")
    }
    if first.is_probe:
        dims = [_union([weight.dims[d] for weight in weights]) for d in range(base.ndim)]
        if axis is not None:
            joined = frozenset().union(*(weight.labels(axis) for weight in weights))
            dims[axis] = ((joined, base.shape[axis]),)
        return [first.replace(base=base, dims=tuple(dims), origin=origin, **books)]
    label, dims = None, first.dims
    if axis is not None:
        label = next((label for w in weights for label in w.labels(axis)), Role.STACK)
        dims = (*dims[:axis], ((label, base.shape[axis]),), *dims[axis + 1 :])
    a, b = (_joined_factors(parts, name, label, axis) for name in ("a", "b"))
    if first.keys is not None:  # joined weights drop the same elements of what is their one input
        sizes = [size for piece, size in axes.pieces(dims) if piece == Role.STACK]
        books["keys"] = jnp.broadcast_to(first.keys.reshape(-1)[0], sizes)
    origin = Origin(origin.paths, None, (), a.shape[-1], first.origin.dropout_rate)
    return [first.replace(base=base, a=a, b=b, dims=dims, origin=origin, **books)]


def _obstacle(parts: Sequence[Any], weights: Sequence[LowRank], axis: int | None) -> str:
    """Return why parts cannot be one weight, or nothing."""
    if weights[0].is_probe and len(weights) < len(parts):
        return "it is joined to what is no weight"
    if any(weight.gain is not None for weight in weights):
        return "it has a magnitude, and what it is joined to another"
    others, labels = [list(weight.dims) for weight in weights], frozenset()
    if axis is not None:
        if any(len(dims.pop(axis)) > 1 for dims in others):
            return "it is joined along a dimension of several axes"
        labels = labels.union(*(weight.labels(axis) for weight in weights))
    if weights[0].is_probe:
        others, labels = [[[size for _, size in d] for d in dims] for dims in others], frozenset()
    if any(dims != others[0] for dims in others) or len(labels) > 1 or axes.REPEATED in labels:
        return "it is joined to a weight with other roles"
    if len({(weight.origin.dropout_rate, weight.keys is None) for weight in weights}) > 1:
        return "it is joined to a weight with another dropout"
    return ""


def _union(dims: Sequence[axes.Dim]) -> axes.Dim:
    """Return a probe's dimension with the labels of all."""
    pieces = zip(*dims, strict=True)
    return tuple((frozenset().union(*(label for label, _ in p)), p[0][1]) for p in pieces)


def _joined_factors(parts: Sequence[Any], name: str, label: Role | None, axis: int | None) -> Any:
    """Return ``a`` or ``b`` of all parts: by rank, but along a stack each entry has its own."""
    sizes = [0 if axis is None else getattr(part, "base", part).shape[axis] for part in parts]
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
            factor = _padded(factor, position, (start, starts[-1] - start - size, 0), 0)
        if label == Role.STACK:
            factor = _padded(factor, factor.ndim - 1, (0, max(ranks) - rank, 0), 0)
        factors.append(factor)
    if label == Role.STACK:  # every entry is zero in all parts but its own
        return sum(factors[1:], factors[0])
    return jnp.concatenate(factors, axis=-1)
