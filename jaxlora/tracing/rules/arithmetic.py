"""Rules for arithmetic on one weight: scaling, summing and padding.

A scale along in axes scales ``a``, one along out axes scales ``b``.
"""

import dataclasses
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.registry import rule
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.lowrank import CARRIES, LowRank
from jaxlora.tracing.values.probe import Probe
from jaxlora.tracing.values.weight import Role, Weight
from jaxlora.weights.adapters import scaling


def elementwise(eqn: Any) -> int:
    """Return the operations of an equation that does one for each element of its result."""
    return compat.size(eqn.outvars[0])


@rule("neg", deferred=deferred.later)
def negate(run: Evaluation, eqn: Any, weight: Weight) -> list[Any]:
    """Negate the base and ``b``."""
    return [weight.replace(base=deferred.lazily(lax.neg, weight.base)).negated()]


@rule("mul", "div", deferred=deferred.later, flops=elementwise)
def scale(run: Evaluation, eqn: Any, x: Any, y: Any) -> list[Any]:
    """Scale a weight by a number, or by a vector along the axes of one factor."""
    is_division = eqn.primitive.name == "div"
    is_first = is_division or _is_scaled(x, y)
    weight, vector = (x, y) if is_first else (y, x)
    vector = run.densify(eqn, vector, "it scales another weight")
    values = [weight, vector] if is_first else [vector, weight]
    if not isinstance(weight, Weight):
        return compat.bind(eqn, values)
    along = [d for d, size in enumerate(jnp.shape(vector)) if size != 1]
    is_elementwise = jnp.size(vector) == weight.size > 1
    if is_elementwise or compat.shape(eqn.outvars[0]) != weight.base.shape:
        return run.without_rule(eqn, values, "it does not scale whole axes")
    base = deferred.bind(eqn, [getattr(value, "base", value) for value in values])
    scaled = weight.scaled_by(operator.truediv if is_division else operator.mul, vector, along)
    if scaled is None:
        return run.without_rule(eqn, values, "it scales along axes of both factors")
    return [scaled.replace(base=base)]


def _is_scaled(x: Any, y: Any) -> bool:
    """Tell whether a product scales its first operand: the larger one, or of equals the weight."""
    x_size, y_size = (v.size if isinstance(v, Weight) else jnp.size(v) for v in (x, y))
    return isinstance(x, Weight) if x_size == y_size else x_size > y_size


@rule("reduce_sum", flops=lambda eqn: compat.size(eqn.invars[0]))
def sum_(run: Evaluation, eqn: Any, weight: LowRank | Probe) -> list[Any]:
    """Sum along axes of the factors; the entries of a stack become so many times the rank."""
    gone = eqn.params["axes"]
    kept = [d for d in range(len(weight.dims)) if d not in gone]
    if isinstance(weight, Probe):
        base = deferred.bind(eqn, [weight.base])
        return [weight.replace(base=base, dims=tuple(weight.dims[d] for d in kept))]
    sums_stack = Role.STACK in weight.labels(*gone)
    if sums_stack and weight.keys is not None:
        return run.without_rule(eqn, [weight], "it sums a stack that has dropout")
    if weight.gain is not None and weight.labels(*gone) & CARRIES["gain"]:
        return run.without_rule(eqn, [weight], "it sums columns that have magnitudes")
    base = deferred.bind(eqn, [weight.base])
    fields: dict[str, Any] = {"base": base, "dims": tuple(weight.dims[d] for d in kept)}
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
    grown = [d for d, amounts in enumerate(config) if any(amounts)]
    if not isinstance(weight, Weight) or any(len(weight.dims[d]) != 1 for d in grown):
        return run.without_rule(eqn, [weight, filling], "it pads what is not one axis")
    filling = run.densify(eqn, filling, "it is padded with")
    has_gain = "gain" in weight.arrays()
    if has_gain and not (isinstance(filling, float | np.ndarray) and filling == 0):
        return run.without_rule(eqn, [weight, filling], "it has a magnitude, its padding none")
    for d in grown:
        base = deferred.lazily(
            lambda x, filling, d=d: padded(x, d, config[d], filling), weight.base, filling
        )
        weight = weight.along(d, lambda x, axis, d=d: padded(x, axis, config[d], 0), base=base)
    return [weight]


def padded(x: Any, axis: int, amounts: Any, filling: Any) -> Any:
    """Return an array padded along one axis: before, after, and between its entries."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = amounts
    return lax.pad(x, jnp.asarray(filling, x.dtype), config)
