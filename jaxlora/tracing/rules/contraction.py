"""Rules for products that consume a weight.

Each runs the program's own operation on the base and adds the low-rank term, computed in the
dtype of the operation. The weight is never formed.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence

import jax
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Params, Var
from jaxlora.tracing.jaxprs.sharing import Reader
from jaxlora.tracing.products import forms, heads
from jaxlora.tracing.products.term import Scaled, Sides, Term
from jaxlora.tracing.recorder import Facts, Kind
from jaxlora.tracing.registry import rule
from jaxlora.tracing.types import Eqn, Operand, Values
from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.chain import send_back
from jaxlora.tracing.values.lowrank import CARRIES, LowRank
from jaxlora.tracing.values.probe import Probe
from jaxlora.tracing.values.weight import Weight
from jaxlora.weights.adapters import merge_dtype

_BOTH = "both operands are adapted weights"


def _flops(eqn: Eqn) -> int:
    (summed, _), _ = eqn.params["dimension_numbers"]
    return _flops_of(eqn, summed)


def _flops_of(eqn: Eqn, summed: Sequence[int]) -> int:
    sizes = compat.shape(eqn.invars[0])
    return 2 * compat.size(eqn.outvars[0]) * math.prod(sizes[d] for d in summed)


@rule("dot_general", is_product=True, flops=_flops)
def dot_general(run: Evaluation, eqn: Eqn, lhs: Operand, rhs: Operand) -> Values:
    """Add ``x a b`` to a product with a weight on either side.

    With ``m`` tokens the low-rank term costs 2·m·rank·(in + out) operations.
    """
    lhs = _operand(run, eqn, 0, lhs, rhs)
    rhs = _operand(run, eqn, 1, rhs, lhs)
    if isinstance(lhs, LowRank):
        x = run.densify(eqn, rhs, _BOTH)  # an array already: of two weights one is left
        return [_product(run, eqn, x, lhs, 0)]
    if isinstance(rhs, LowRank):
        return [_product(run, eqn, lhs, rhs, 1)]
    return compat.bind(eqn, [lhs, rhs])


def _operand(
    run: Evaluation, eqn: Eqn, side: int, value: Operand, other: Operand
) -> jax.Array | LowRank:
    """Return an operand as the weight that the product takes as one, or as an array."""
    if not isinstance(value, Weight):
        return value
    in_, out, stack = _axes_used(eqn, side, value)
    if value.is_rows_to(in_, out):
        return run.densify(eqn, value, "")
    if isinstance(other, Weight) and _gives_way(value, other):
        return run.densify(eqn, value, _BOTH)
    if isinstance(value, LowRank):
        return value
    run.record(eqn, value, Kind.CONTRACTED, in_=in_, out=out, stack=stack)
    return deferred.now(value.base)


def _gives_way(weight: Weight, other: Weight) -> bool:
    """Tell whether of two weights that are multiplied this is made dense: rows, or the smaller."""
    return weight.is_rows() or (not other.is_rows() and other.size >= weight.size)


def _narrowed(
    run: Evaluation, eqn: Eqn, side: int, term: Term, weight: LowRank, x: jax.Array
) -> tuple[jax.Array | None, int]:
    """Return the product of the input and the first factor, and how many products share it.

    It is made at the first of them, for all at once; a product that shares nothing has None.
    """
    if (eqn, side) in run.narrowed:
        return run.narrowed.pop((eqn, side))
    if weight.has_dropout or term.scales_input:
        return None, 1
    group = {(eqn, side): weight, **_sharing(run, Reader(eqn, 1 - side), x, term.start(weight))}
    if len(group) == 1:
        return None, 1
    with run.scope(*group.values()):
        products = term.narrow(run.options, x, [*group.values()])
    for other, h in zip(group, products, strict=True):
        run.narrowed[other] = (h, len(group))
    return run.narrowed.pop((eqn, side))


def _sharing(
    run: Evaluation, reader: Reader, x: jax.Array, start: Hashable
) -> dict[tuple[Eqn, int], LowRank]:
    """Return the weights of the later products of an input whose terms start the same.

    They are by product and side, for in another of three weights that one may give way.
    """
    found: dict[tuple[Eqn, int], LowRank] = {}
    for other in run.known.plan.readers_after(reader):
        side = 1 - other.operand
        atom = other.eqn.invars[side]
        weight = run.env.get(atom) if isinstance(atom, Var) else None
        if not isinstance(weight, LowRank) or weight.is_rows():
            continue
        if Term.from_equation(other.eqn, side, weight, x).start(weight) == start:
            found[other.eqn, side] = weight
    return found


def _axes_used(eqn: Eqn, side: int, weight: Weight) -> tuple[frozenset, frozenset, frozenset]:
    """Return the labels of a weight that are summed, free, and in the batch or picked.

    Entries that were picked are a stack, wherever the axes of the indices go.
    """
    groups = Sides.from_equation(eqn, side).weight
    in_, free, batch = (weight.labels(*dims) for dims in groups)
    if isinstance(weight, Probe):
        in_, free = in_ - weight.indexed, free - weight.indexed
    out = free - in_
    return in_, out, (batch - in_ - free) | (weight.indexed - in_ - out)


def _product(run: Evaluation, eqn: Eqn, x: jax.Array, weight: LowRank, side: int) -> jax.Array:
    """Return the product of x and a weight, in the form that is cheaper."""

    def bind(x, w):
        return run.product(lambda x, w: compat.bind(eqn, [x, w] if side else [w, x])[0], x, w)

    term = Term.from_equation(eqn, side, weight, x)
    if run.options.observes:
        return _observed(run, bind(x, weight.base), x, weight, term)
    if (gain := term.gain) is not None and gain.scaled is Scaled.WEIGHT:
        return bind(x, run.densify(eqn, weight, "its magnitude is along summed and other axes"))
    columns, weight = weight.gain, weight.replace(gain=None)

    def scaled(value, what):
        if gain is None or columns is None or gain.scaled is not what:
            return value
        with run.scope(weight):
            return gain.scale(value, columns)

    x = scaled(x, Scaled.INPUT)
    h, sharing = _narrowed(run, eqn, side, term, weight, x)
    form, why = forms.choose(run, weight, term, is_shared=h is not None)
    in_, out, stack = _axes_used(eqn, side, weight)
    used: Facts = {"in_": in_, "out": out, "stack": stack}
    facts: Facts = {**used, "form": form, "why": why, "sharing": sharing}
    run.record(eqn, weight, Kind.CONTRACTED, **facts)
    if form == "weight-side":
        return scaled(forms.weight_side(run, x, weight, h, bind, term), Scaled.RESULT)
    y = bind(x, weight.base)

    def with_term(y):
        return forms.with_term(run, y, x, weight, h, term)

    if heads.leave(run, eqn, y, with_term, weight, gain, columns):
        return y
    return scaled(with_term(y), Scaled.RESULT)


def _observed(
    run: Evaluation, y: jax.Array, x: jax.Array, weight: LowRank, term: Term
) -> jax.Array:
    """Return the product y, whose gradients tell of the input, in float32 or wider."""
    if term.order != ("a", "b"):  # it sums over the columns: what goes in is no input of ``a``
        return y
    wide = merge_dtype(x.dtype)
    weight = weight.replace(base=weight.base.astype(wide))
    term = dataclasses.replace(term, dtype=wide, precision=lax.Precision.HIGHEST)
    return send_back(y, *term.narrow(run.options, x.astype(wide), [weight]))


def _ragged_flops(eqn: Eqn) -> int:
    (summed, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return _flops_of(eqn, summed)


@rule("ragged_dot_general", is_product=True, flops=_ragged_flops)
def ragged_dot(run: Evaluation, eqn: Eqn, x: Operand, weight: Operand, groups: jax.Array) -> Values:
    """Add two products, each ragged where its factor has an entry for each group of rows."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_summed, summed), (x_batch, _) = numbers.dot_dimension_numbers
    x = run.densify(eqn, x, "it is multiplied with other weights in groups")
    if not isinstance(weight, Weight):
        return compat.bind(eqn, [x, weight, groups])
    free = [d for d in range(x.ndim) if d not in x_summed]
    if x_batch or list(numbers.lhs_ragged_dimensions) != free:
        return run.without_rule(eqn, [x, weight, groups], "it has several batch or row axes")
    group = list(numbers.rhs_group_dimensions)
    out = [d for d in range(weight.base.ndim) if d not in (*summed, *group)]
    stack, in_, out_ = (weight.labels(*dims) for dims in (group, summed, out))
    names = ("a", "b") if in_ <= CARRIES["a"] else ("b", "a")
    if isinstance(weight, LowRank):
        fits = in_ <= CARRIES[names[0]] and out_ <= CARRIES[names[1]]
        if not fits or len(stack) > 1 or axes.REPEATED in stack:
            reason = "its axes have other roles elsewhere"
            return run.without_rule(eqn, [x, weight, groups], reason)
        if weight.gain is not None:
            return run.without_rule(eqn, [x, weight, groups], "it has a magnitude")
    run.record(eqn, weight, Kind.CONTRACTED, stack=stack, in_=in_, out=out_)
    y = run.product(lambda *values: compat.bind(eqn, values)[0], x, weight.base, groups)
    if not isinstance(weight, LowRank):
        return [y]
    weight = weight.transposed(weight.base, [*group, *summed, *out])
    with run.scope(weight):
        h = weight.input(x).transpose(*free, *x_summed).reshape(len(x), -1)
        first, second = (
            _of_each_group(name, factor, weight, stack, len(groups))
            for name, factor in zip(names, _in_order(names, weight), strict=True)
        )
        h = run.named(_ragged(h, first, groups, eqn.params)).astype(second.dtype)
        product = _ragged(h, second.mT, groups, eqn.params)
        return [y + product.reshape(y.shape).astype(y.dtype)]


def _in_order(names: tuple[str, str], weight: LowRank) -> list[jax.Array]:
    factors = dict(zip("ab", weight.factors(weight.base.dtype), strict=True))
    return [factors[name] for name in names]


def _of_each_group(
    name: str, factor: jax.Array, weight: LowRank, label: frozenset, count: int
) -> jax.Array:
    """Return a factor ``(groups, size, rank)``, or ``(size, rank)`` where all groups have one."""
    is_each = count == 1 or (label and label <= CARRIES[name])  # one has an axis of size 1
    leading = (count,) if is_each else ()
    return factor.reshape(*leading, -1, weight.rank)


def _ragged(x: jax.Array, factor: jax.Array, groups: jax.Array, params: Params) -> jax.Array:
    """Return the product of the rows of x with the matrix of their group, or of all."""
    how = {name: params[name] for name in ("precision", "preferred_element_type")}
    if factor.ndim == 2:
        return lax.dot(x, factor, **how)
    return lax.ragged_dot(x, factor, groups, group_offset=params["group_offset"], **how)
