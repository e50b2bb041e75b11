"""Rules for products that consume a weight.

Each runs the program's own operation on the base and adds the low-rank term, computed in the
dtype of the operation. The weight is never formed.
"""

import dataclasses
from typing import Any

from jax import lax

from jaxlora.tracing.interpreter import Evaluation, rule
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.products import forms
from jaxlora.tracing.products.term import Sides, Term
from jaxlora.tracing.recorder import CONTRACTED
from jaxlora.tracing.values import axes
from jaxlora.tracing.values.chain import told
from jaxlora.tracing.values.lowrank import CARRIES, LowRank
from jaxlora.weights.adapters import merge_dtype


@rule("dot_general")
def dot_general(run: Evaluation, eqn: Any, lhs: Any, rhs: Any) -> list[Any]:
    """Add ``x a b`` to a product with a weight on either side.

    With ``m`` tokens the low-rank term costs 2·m·rank·(in + out) operations.
    """
    values = [_weight_or_array(run, eqn, 0, lhs, rhs)]
    values.append(_weight_or_array(run, eqn, 1, rhs, values[0]))
    for side, value in enumerate(values):
        if isinstance(value, LowRank):
            return [_product(run, eqn, values[1 - side], value, side)]
    return compat.bind(eqn, values)


def _weight_or_array(run: Evaluation, eqn: Any, side: int, value: Any, other: Any) -> Any:
    """Return the weight if the product can take it as one, else an array; tell a probe's use."""
    if not isinstance(value, LowRank):
        return value
    in_, out, stack = _axes_used(eqn, side, value)
    if value.is_probe:
        is_row = bool(value.indexed) and not (in_ and out)
    else:
        is_picked = bool(value.indexed & (in_ | out))
        is_row = is_picked and value.is_rows() and not value.has_matrices()
    if is_row:
        return run.densify(eqn, value, "")
    is_lesser = isinstance(other, LowRank) and not other.is_rows() and other.size >= value.size
    if is_lesser or (isinstance(other, LowRank) and value.is_rows()):
        return run.densify(eqn, value, "both operands are adapted weights")
    if not value.is_probe:
        return value
    run.record(eqn, value, CONTRACTED, in_=in_, out=out, stack=stack)
    return value.base


def _narrowed(
    run: Evaluation, eqn: Any, side: int, term: Term, weight: LowRank, x: Any
) -> tuple[Any, int]:
    """Return the product of the input and the first factor, and how many products share it.

    It is made at the first of them, for all at once; a product that shares nothing has None.
    """
    if id(eqn) in run.narrowed:
        return run.narrowed.pop(id(eqn))
    if weight.has_dropout or term.scales_input:
        return None, 1
    group, start = {id(eqn): weight}, term.start(weight)
    readers = iter(run.readers.get((id(eqn), 1 - side), ()))
    next((other for other, _ in readers if other is eqn), None)  # those before have run
    for other, at in readers:
        found = run.env.get(other.invars[1 - at])
        if not isinstance(found, LowRank) or found.is_rows():
            continue
        if Term.of(other, 1 - at, found, x).start(found) == start:
            group[id(other)] = found
    if len(group) == 1:
        return None, 1
    with run.scope(*group.values()):
        products = term.narrow(run, x, [*group.values()])
    run.narrowed.update((at, (h, len(group))) for at, h in zip(group, products, strict=True))
    return run.narrowed.pop(id(eqn))


def _axes_used(eqn: Any, side: int, weight: LowRank) -> tuple[frozenset, frozenset, frozenset]:
    """Return the labels of a weight that are summed, free, and in the batch or picked.

    Entries that were picked are a stack, wherever the axes of the indices go.
    """
    groups = Sides.of(eqn, side).weight
    in_, free, batch = (weight.labels(*dims) for dims in groups)
    if weight.is_probe:
        in_, free = in_ - weight.indexed, free - weight.indexed
    out = free - in_
    return in_, out, (batch - in_ - free) | (weight.indexed - in_ - out)


def _product(run: Evaluation, eqn: Any, x: Any, weight: LowRank, side: int) -> Any:
    """Return the product of x and a weight, in the form that is cheaper."""

    def bind(x, w):
        return run.product(lambda x, w: compat.bind(eqn, [x, w] if side else [w, x])[0], x, w)

    term = Term.of(eqn, side, weight, x)
    if run.options.observes:
        return _observed(run, bind(x, weight.base), x, weight, term)
    if (gain := term.gain) is not None and gain.side == "weight":
        return bind(x, run.densify(eqn, weight, "its magnitude is along summed and other axes"))
    columns, weight = weight.gain, weight.replace(gain=None)
    if gain is not None and gain.side == "in":
        with run.scope(weight):
            x = gain.scale(x, columns)
    h, sharing = _narrowed(run, eqn, side, term, weight, x)
    form = forms.choose(run, weight, term, is_shared=h is not None)
    in_, out, stack = _axes_used(eqn, side, weight)
    how: Any = {"form": form, "sharing": sharing}
    run.record(eqn, weight, CONTRACTED, in_=in_, out=out, stack=stack, **how)
    if form == "weight-side":
        y = forms.weight_side(run, x, weight, h, bind, term)
    else:
        y = forms.with_term(run, bind(x, weight.base), x, weight, h, term)
    if gain is None or gain.side != "out":
        return y
    with run.scope(weight):
        return gain.scale(y, columns)


def _observed(run: Evaluation, y: Any, x: Any, weight: LowRank, term: Term) -> Any:
    """Return the product y, whose gradients tell of the input, in float32 or wider."""
    if term.order != ("a", "b"):  # it sums over the columns: what goes in is no input of ``a``
        return y
    wide = merge_dtype(x.dtype)
    weight = weight.replace(base=weight.base.astype(wide))
    term = dataclasses.replace(term, dtype=wide, precision=lax.Precision.HIGHEST)
    return told(y, *term.narrow(run, x.astype(wide), [weight]))


@rule("ragged_dot_general")
def ragged_dot(run: Evaluation, eqn: Any, x: Any, weight: Any, groups: Any) -> list[Any]:
    """Add two products, each ragged where its factor has an entry for each group of rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, summed), (x_batch, _) = numbers.dot_dimension_numbers
    x = run.densify(eqn, x, "it is multiplied with other weights in groups")
    if not isinstance(weight, LowRank):
        return compat.bind(eqn, [x, weight, groups])
    free = [d for d in range(x.ndim) if d not in x_summed]
    if x_batch or list(numbers.lhs_ragged_dimensions) != free:
        return run.without_rule(eqn, [x, weight, groups], "it has several batch or row axes")
    group = list(numbers.rhs_group_dimensions)
    out = [d for d in range(weight.base.ndim) if d not in (*summed, *group)]
    labels: dict[str, Any] = {"stack": weight.labels(*group), "in_": weight.labels(*summed)}
    labels["out"] = weight.labels(*out)
    names = ("a", "b") if labels["in_"] <= CARRIES["a"] else ("b", "a")
    if not weight.is_probe:
        fits = labels["in_"] <= CARRIES[names[0]] and labels["out"] <= CARRIES[names[1]]
        if not fits or len(labels["stack"]) > 1 or axes.REPEATED in labels["stack"]:
            reason = "its axes have other roles elsewhere"
            return run.without_rule(eqn, [x, weight, groups], reason)
    if weight.gain is not None:
        return run.without_rule(eqn, [x, weight, groups], "it has a magnitude")
    run.record(eqn, weight, CONTRACTED, **labels)
    y = run.product(lambda *values: compat.bind(eqn, values)[0], x, weight.base, groups)
    if weight.is_probe:
        return [y]
    weight = weight.transposed(weight.base, [*group, *summed, *out])
    with run.scope(weight):
        h = weight.input(x).transpose(*free, *x_summed).reshape(len(x), -1)
        first, second = (
            _of_each_group(name, factor, weight, labels["stack"], len(groups))
            for name, factor in zip(names, _in_order(names, weight), strict=True)
        )
        h = run.named(_ragged(h, first, groups, eqn.params)).astype(second.dtype)
        product = _ragged(h, second.mT, groups, eqn.params)
        return [y + product.reshape(y.shape).astype(y.dtype)]


def _in_order(names: tuple[str, str], weight: LowRank) -> list[Any]:
    factors = dict(zip("ab", weight.factors(weight.base.dtype), strict=True))
    return [factors[name] for name in names]


def _of_each_group(name: str, factor: Any, weight: LowRank, label: frozenset, count: int) -> Any:
    """Return a factor ``(groups, size, rank)``, or ``(size, rank)`` where all groups have one."""
    leading = (count,) if label and label <= CARRIES[name] else ()
    return factor.reshape(*leading, -1, weight.rank)


def _ragged(x: Any, factor: Any, groups: Any, params: dict[str, Any]) -> Any:
    """Return the product of the rows of x with the matrix of their group, or of all."""
    how = {name: params[name] for name in ("precision", "preferred_element_type")}
    if factor.ndim == 2:
        return lax.dot(x, factor, **how)
    return lax.ragged_dot(x, factor, groups, group_offset=params["group_offset"], **how)
