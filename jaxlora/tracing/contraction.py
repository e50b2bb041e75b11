"""Rules for products that consume a weight.

Each runs the program's own operation on the base and adds the low-rank term, computed in the
dtype of the operation. The weight is never formed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxlora.tracing import axes, compat, forms, placement
from jaxlora.tracing.interpreter import CONTRACTED, Form, Walk, rule
from jaxlora.tracing.lowrank import CARRIES, RANK, LowRank, Role
from jaxlora.tracing.product import chain


@dataclasses.dataclass(frozen=True)
class _Operand:
    """One side of a product: its value, and which of its dimensions are summed or in the batch."""

    value: Any
    summed: Sequence[int]
    batch: Sequence[int]

    @property
    def free(self) -> list[int]:
        """The dimensions that only this side has."""
        return [d for d in range(len(self.value.shape)) if d not in (*self.summed, *self.batch)]


@rule("dot_general")
def dot_general(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> list[Any]:
    """Add ``x a b`` to a product with a weight on either side.

    With ``m`` tokens the low-rank term costs 2·m·rank·(in + out) operations.
    """
    (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs = _weight_or_array(walk, eqn, _Operand(lhs, lhs_summed, lhs_batch), rhs)
    rhs = _weight_or_array(walk, eqn, _Operand(rhs, rhs_summed, rhs_batch), lhs)
    left, right = _Operand(lhs, lhs_summed, lhs_batch), _Operand(rhs, rhs_summed, rhs_batch)
    if isinstance(lhs, LowRank):
        return [_product(walk, eqn, left, right, weight_is_left=True)]
    if isinstance(rhs, LowRank):
        return [_product(walk, eqn, right, left, weight_is_left=False)]
    return compat.bind(eqn, [lhs, rhs])


def _product(
    walk: Walk, eqn: Any, operand: _Operand, other: _Operand, *, weight_is_left: bool
) -> Any:
    """Return the product of x and a weight, in the form that is cheaper."""

    def bind(x, w):
        return compat.bind(eqn, [w, x] if weight_is_left else [x, w])[0]

    def term(walk, x, weight, moving=""):
        sides = dataclasses.replace(operand, value=weight), dataclasses.replace(other, value=x)
        return _term(walk, eqn, *sides, moving, weight_is_left=weight_is_left)

    weight, x = operand.value, other.value
    if _form(walk, eqn, operand) == "weight-side":
        return forms.weight_side(walk, x, weight, bind, term)
    return forms.with_term(walk, bind(x, weight.base), x, weight, term)


def _form(walk: Walk, eqn: Any, operand: _Operand) -> Form:
    weight, taken = operand.value, (*operand.free, *operand.batch)
    tokens = math.prod(eqn.outvars[0].aval.shape) // math.prod(weight.shape[d] for d in taken)
    return forms.choose(walk, weight, tokens)


def _weight_or_array(walk: Walk, eqn: Any, operand: _Operand, other: Any) -> Any:
    """Return the weight if the product can take it as one, else an array; write down the use."""
    value = operand.value
    if not isinstance(value, LowRank):
        return value
    groups = (operand.summed, operand.free, operand.batch)
    in_, free, batch = (value.labels(*group) for group in groups)
    out, stack = free - in_, batch - in_ - free
    picked = value.indexed & (in_ | out)
    if (picked and value.is_rows()) or (value.is_probe and value.indexed and not (in_ and out)):
        return walk.densify(eqn, value, "")
    is_lesser = isinstance(other, LowRank) and not other.is_rows() and other.size >= value.size
    if is_lesser or (isinstance(other, LowRank) and value.is_rows()):
        return walk.densify(eqn, value, "both operands are adapted weights")
    stack |= value.indexed - in_ - out
    form = "" if value.is_probe else _form(walk, eqn, operand)
    walk.record(eqn, value, CONTRACTED, in_=in_, out=out, stack=stack, form=form)
    return value.base if value.is_probe else value


def _term(
    walk: Walk,
    eqn: Any,
    operand: _Operand,
    other: _Operand,
    moving: str,
    *,
    weight_is_left: bool,
) -> Any:
    """Return the product of x with the factors, with a name for each piece of an axis."""
    weight, x = operand.value, other.value
    names = [[("w", d, i) for i in range(len(dim))] for d, dim in enumerate(weight.dims)]
    x_names: list[list[Any]] = [[("x", d)] for d in range(x.ndim)]
    x_sizes = [[size] for size in x.shape]
    shared = [*zip(other.summed, operand.summed, strict=True)]
    shared += zip(other.batch, operand.batch, strict=True)
    for x_dim, dim in shared:
        x_names[x_dim] = names[dim]
        x_sizes[x_dim] = [size for _, size in weight.dims[dim]]
    x_free = [x_names[d] for d in range(x.ndim) if d not in (*other.summed, *other.batch)]
    free = [names[d] for d in operand.free]
    sides = (free, x_free) if weight_is_left else (x_free, free)
    out_names = _flat([[names[d] for d in operand.batch], *sides])
    flat_names, sizes = _flat([x_names]), dict(zip(_flat([x_names]), _flat([x_sizes]), strict=True))
    pieces = zip(_flat([names]), axes.pieces(weight.dims), strict=True)
    sizes |= {name: size for name, (_, size) in pieces}
    a_names = [*weight.piece_labels(names, "a"), RANK]
    b_names = [*weight.piece_labels(names, "b"), RANK]

    x = placement.reshape(weight.input(x), x_sizes)
    known = {*a_names, *b_names, *out_names}
    gone = [i for i, name in enumerate(flat_names) if name not in known]
    if gone:  # the weight repeats along what is summed
        x, flat_names = x.sum(gone), [name for name in flat_names if name in known]
    kept = [i for i, n in enumerate(out_names) if n in {*flat_names, *a_names, *b_names}]
    a, b = weight.factors(weight.base.dtype)
    product = chain(
        x,
        a,
        b,
        names=tuple(map(tuple, (flat_names, a_names, b_names, (out_names[i] for i in kept)))),
        precision=eqn.params["precision"],
        dtype=eqn.params["preferred_element_type"],
        named=walk.named,
        moving=moving,
    )
    product = placement.repeated(product, kept, [sizes[name] for name in out_names])
    return product


def _flat(groups: Sequence[Sequence[Sequence[Any]]]) -> list[Any]:
    return [name for group in groups for names in group for name in names]


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
    walk.record(eqn, weight, CONTRACTED, **labels)
    (y,) = compat.bind(eqn, [x, weight.base, groups])
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
