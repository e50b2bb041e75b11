"""Rules for products that consume a weight.

Each runs the program's own operation on the base and adds the low-rank term, computed in the
dtype of the operation. The weight is never formed.
"""

import dataclasses
from typing import Any

from jax import lax

from jaxlora.tracing import compat, forms
from jaxlora.tracing.interpreter import CONTRACTED, Walk, rule
from jaxlora.tracing.lowrank import CARRIES, LowRank, Role
from jaxlora.tracing.product import told
from jaxlora.tracing.term import Sides, Term
from jaxlora.weight import merge_dtype


@rule("dot_general")
def dot_general(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> list[Any]:
    """Add ``x a b`` to a product with a weight on either side.

    With ``m`` tokens the low-rank term costs 2·m·rank·(in + out) operations.
    """
    values = [_weight_or_array(walk, eqn, 0, lhs, rhs)]
    values.append(_weight_or_array(walk, eqn, 1, rhs, values[0]))
    for side, value in enumerate(values):
        if isinstance(value, LowRank):
            return [_product(walk, eqn, values[1 - side], value, side)]
    return compat.bind(eqn, values)


def _weight_or_array(walk: Walk, eqn: Any, side: int, value: Any, other: Any) -> Any:
    """Return the weight if the product can take it as one, else an array; tell a probe's use."""
    if not isinstance(value, LowRank):
        return value
    in_, out, stack = _axes_used(eqn, side, value)
    picked = value.indexed & (in_ | out)
    if (picked and value.is_rows()) or (value.is_probe and value.indexed and not (in_ and out)):
        return walk.densify(eqn, value, "")
    is_lesser = isinstance(other, LowRank) and not other.is_rows() and other.size >= value.size
    if is_lesser or (isinstance(other, LowRank) and value.is_rows()):
        return walk.densify(eqn, value, "both operands are adapted weights")
    if not value.is_probe:
        return value
    walk.record(eqn, value, CONTRACTED, in_=in_, out=out, stack=stack)
    return value.base


def _narrowed(
    walk: Walk, eqn: Any, side: int, term: Term, weight: LowRank, x: Any
) -> tuple[Any, int]:
    """Return the product of the input and the first factor, and how many products share it.

    It is made at the first of them, for all at once; a product that shares nothing has None.
    """
    frame = walk.frame
    if id(eqn) in frame.narrowed:
        return frame.narrowed.pop(id(eqn))
    if weight.has_dropout or term.scales_input:
        return None, 1
    group, start = {id(eqn): weight}, term.start(weight)
    readers = iter(frame.readers.get((id(eqn), 1 - side), ()))
    next((other for other, _ in readers if other is eqn), None)  # those before have run
    for other, at in readers:
        found = frame.env.get(other.invars[1 - at])
        if not isinstance(found, LowRank) or found.is_rows():
            continue
        if Term.of(other, 1 - at, found, x).start(found) == start:
            group[id(other)] = found
    if len(group) == 1:
        return None, 1
    with walk.scope(*group.values()):
        products = term.narrow(walk, x, [*group.values()])
    frame.narrowed.update((at, (h, len(group))) for at, h in zip(group, products, strict=True))
    return frame.narrowed.pop(id(eqn))


def _axes_used(eqn: Any, side: int, weight: LowRank) -> tuple[frozenset, frozenset, frozenset]:
    """Return the labels of a weight that are summed, free, and in the batch or picked."""
    groups = Sides.of(eqn, side).weight
    in_, free, batch = (weight.labels(*dims) for dims in groups)
    out = free - in_
    return in_, out, (batch - in_ - free) | (weight.indexed - in_ - out)


def _product(walk: Walk, eqn: Any, x: Any, weight: LowRank, side: int) -> Any:
    """Return the product of x and a weight, in the form that is cheaper."""

    def bind(x, w):
        return walk.product(lambda x, w: compat.bind(eqn, [x, w] if side else [w, x])[0], x, w)

    term = Term.of(eqn, side, weight, x)
    if walk.observes:
        return _observed(walk, bind(x, weight.base), x, weight, term)
    if (gain := term.gain) is not None and gain.side == "weight":
        return bind(x, walk.densify(eqn, weight, "its magnitude is along summed and other axes"))
    columns, weight = weight.gain, weight.replace(gain=None)
    if gain is not None and gain.side == "in":
        with walk.scope(weight):
            x = gain.scale(x, columns)
    h, sharing = _narrowed(walk, eqn, side, term, weight, x)
    form = forms.choose(walk, weight, term, is_shared=h is not None)
    in_, out, stack = _axes_used(eqn, side, weight)
    how: Any = {"form": form, "sharing": sharing}
    walk.record(eqn, weight, CONTRACTED, in_=in_, out=out, stack=stack, **how)
    if form == "weight-side":
        y = forms.weight_side(walk, x, weight, h, bind, term)
    else:
        y = forms.with_term(walk, bind(x, weight.base), x, weight, h, term)
    if gain is None or gain.side != "out":
        return y
    with walk.scope(weight):
        return gain.scale(y, columns)


def _observed(walk: Walk, y: Any, x: Any, weight: LowRank, term: Term) -> Any:
    """Return the product y, whose gradients tell of the input, in float32 or wider."""
    if term.order != ("a", "b"):  # it sums over the columns: what goes in is no input of ``a``
        return y
    wide = merge_dtype(x.dtype)
    weight = weight.replace(base=weight.base.astype(wide))
    term = dataclasses.replace(term, dtype=wide, precision=lax.Precision.HIGHEST)
    return told(y, *term.narrow(walk, x.astype(wide), [weight]))


@rule("ragged_dot_general")
def ragged_dot(walk: Walk, eqn: Any, x: Any, weight: Any, groups: Any) -> list[Any]:
    """Add two ragged products, by the factors of the expert of each group of rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, summed), (x_batch, _) = numbers.dot_dimension_numbers
    x = walk.densify(eqn, x, "it is multiplied with other weights in groups")
    if not isinstance(weight, LowRank):
        return compat.bind(eqn, [x, weight, groups])
    free = [d for d in range(x.ndim) if d not in x_summed]
    if x_batch or list(numbers.lhs_ragged_dimensions) != free:
        return walk.without_rule(eqn, [x, weight, groups], "it has several batch or row axes")
    group = list(numbers.rhs_group_dimensions)
    out = [d for d in range(weight.base.ndim) if d not in (*summed, *group)]
    labels: dict[str, Any] = {"stack": weight.labels(*group), "in_": weight.labels(*summed)}
    labels["out"] = weight.labels(*out)
    names = ("a", "b") if labels["in_"] <= CARRIES["a"] else ("b", "a")
    fits = [labels["in_"] <= CARRIES[names[0]], labels["out"] <= CARRIES[names[1]]]
    if not weight.is_probe and not (all(fits) and labels["stack"] <= {Role.STACK}):
        reason = "its axes have other roles elsewhere"
        return walk.without_rule(eqn, [x, weight, groups], reason)
    if weight.gain is not None:
        return walk.without_rule(eqn, [x, weight, groups], "it has a magnitude")
    walk.record(eqn, weight, CONTRACTED, **labels)
    y = walk.product(lambda *values: compat.bind(eqn, values)[0], x, weight.base, groups)
    if weight.is_probe:
        return [y]
    weight = weight.transposed(weight.base, [*group, *summed, *out])
    with walk.scope(weight):
        factors = dict(zip("ab", weight.factors(weight.base.dtype), strict=True))
        first, second = (factors[name].reshape(len(groups), -1, weight.rank) for name in names)
        how = {"precision": eqn.params["precision"], "group_offset": eqn.params["group_offset"]}
        how["preferred_element_type"] = eqn.params["preferred_element_type"]
        h = weight.input(x).transpose(*free, *x_summed).reshape(len(x), -1)
        h = walk.named(lax.ragged_dot(h, first, groups, **how)).astype(second.dtype)
        product = lax.ragged_dot(h, second.swapaxes(1, 2), groups, **how)
        return [y + product.reshape(y.shape).astype(y.dtype)]
