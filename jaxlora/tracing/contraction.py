"""Rules for operations that consume a weight: products and convolutions.

Each runs the program's own operation on the base and adds the low-rank term, computed in the
dtype of the operation. The weight is never formed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing import axes, compat
from jaxlora.tracing.interpreter import CONTRACTED, Walk, rule
from jaxlora.tracing.lowrank import RANK, LowRank, Role
from jaxlora.tracing.product import chain, contract


@dataclasses.dataclass(frozen=True)
class _Operand:
    """One side of a product: its value, and which of its dimensions are summed or in the batch."""

    value: Any
    summed: Sequence[int]
    batch: Sequence[int]

    @property
    def free(self) -> list[int]:
        """The dimensions that only this side has."""
        return [d for d in range(self.value.base.ndim) if d not in (*self.summed, *self.batch)]


@rule("dot_general")
def dot_general(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> list[Any]:
    """Add ``x a b`` to a product with a weight on either side.

    With ``m`` tokens the low-rank term costs 2·m·rank·(in + out) operations.
    """
    (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs = _weight_or_array(walk, eqn, _Operand(lhs, lhs_summed, lhs_batch), rhs)
    rhs = _weight_or_array(walk, eqn, _Operand(rhs, rhs_summed, rhs_batch), lhs)
    base = [value.base if isinstance(value, LowRank) else value for value in (lhs, rhs)]
    (y,) = compat.bind(eqn, base)
    left, right = _Operand(lhs, lhs_summed, lhs_batch), _Operand(rhs, rhs_summed, rhs_batch)
    if isinstance(lhs, LowRank):
        y = _add_product(eqn, y, left, right, weight_is_left=True)
    elif isinstance(rhs, LowRank):
        y = _add_product(eqn, y, right, left, weight_is_left=False)
    return [y]


def _weight_or_array(walk: Walk, eqn: Any, operand: _Operand, other: Any) -> Any:
    """Return the weight if the product can take it as one, else an array; write down the use."""
    value = operand.value
    if not isinstance(value, LowRank):
        return value
    groups = (operand.summed, operand.free, operand.batch)
    in_, free, batch = (axes.labels([value.dims[d] for d in group]) for group in groups)
    out, stack = free - in_, batch - in_ - free
    picked = value.indexed & (in_ | out)
    if (picked and value.is_rows()) or (value.is_probe and value.indexed and not (in_ and out)):
        return walk.densify(eqn, value, "")
    is_lesser = isinstance(other, LowRank) and not other.is_rows() and other.size >= value.size
    if is_lesser or (isinstance(other, LowRank) and value.is_rows()):
        return walk.densify(eqn, value, "both operands are adapted weights")
    stack |= value.indexed - in_ - out
    walk.record(eqn, value, CONTRACTED, in_=in_, out=out, stack=stack)
    return value.base if value.is_probe else value


def _add_product(
    eqn: Any, y: Any, operand: _Operand, other: _Operand, *, weight_is_left: bool
) -> Any:
    """Return y plus the product of x with the factors, with a name for each piece of an axis."""
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

    with jax.named_scope("lora"):
        x = _low_rank_input(x, weight).reshape(_flat([x_sizes]))
        a, b = weight.factors(weight.base.dtype)
        product = chain(
            x,
            _flat([x_names]),
            (a, [*weight.piece_labels(names, "a"), RANK]),
            (b, [*weight.piece_labels(names, "b"), RANK]),
            out_names,
            eqn.params["precision"],
            eqn.params["preferred_element_type"],
        )
        return y + product.reshape(y.shape).astype(y.dtype)


def _flat(groups: Sequence[Sequence[Sequence[Any]]]) -> list[Any]:
    return [name for group in groups for names in group for name in names]


def _low_rank_input(x: Any, weight: LowRank) -> Any:
    """Return the low-rank path's input: floating, and with dropout if the weight has it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(weight.base.dtype)
    if weight.keys is None or weight.origin.dropout_rate == 0:
        return x
    keep = 1 - weight.origin.dropout_rate
    mask = jax.random.bernoulli(weight.keys.reshape(-1)[0], keep, x.shape)
    return jnp.where(mask, x / keep, 0).astype(x.dtype)


@rule("conv_general_dilated")
def convolution(walk: Walk, eqn: Any, x: Any, kernel: Any) -> list[Any]:
    """Add a convolution to rank channels and a product over them.

    With groups, each group's input is convolved with the same ``a`` and multiplied with its own
    part of ``b``, which is what the factors of the grouped kernel ``(*window, in / groups, out)``
    mean.
    """
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    x = walk.densify(eqn, x, "the weight is convolved with, not by")
    if not isinstance(kernel, LowRank):
        return compat.bind(eqn, [x, kernel])
    if params["batch_group_count"] != 1:
        return walk.without_rule(eqn, [x, kernel], "it has batch groups")
    out_dim, *in_dims = numbers.rhs_spec
    in_ = axes.labels([kernel.dims[d] for d in in_dims])
    out = axes.labels([kernel.dims[out_dim]])
    if in_ & out or (not kernel.is_probe and (in_ - {Role.IN} or out - {Role.OUT})):
        return walk.without_rule(eqn, [x, kernel], "its axes have other roles elsewhere")
    walk.record(eqn, kernel, CONTRACTED, in_=in_, out=out, stack=kernel.indexed - in_ - out)
    (y,) = compat.bind(eqn, [x, kernel.base])
    if kernel.is_probe:
        return [y]

    groups = params["feature_group_count"]
    with jax.named_scope("lora"):
        a, b = kernel.factors(kernel.base.dtype)
        window = [kernel.base.shape[d] for d in range(kernel.base.ndim) if d != out_dim]
        a = jnp.concatenate([a.reshape(*window, -1)] * groups, axis=-1)
        h = lax.conv_general_dilated(
            _low_rank_input(x, kernel),
            jnp.moveaxis(a, -1, out_dim),
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=numbers,
            feature_group_count=groups,
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        return [y + _mix_channels(h, b, groups, numbers.out_spec[1], params).astype(y.dtype)]


def _mix_channels(h: Any, b: Any, groups: int, channel: int, params: Any) -> Any:
    """Return the product of ``h``, groups times rank channels, with ``b`` (out, rank)."""
    rank = b.shape[-1]
    h = h.reshape(*h.shape[:channel], groups, rank, *h.shape[channel + 1 :])
    h_names: list[Any] = list(range(h.ndim))
    h_names[channel], h_names[channel + 1] = "group", RANK
    out_names = [name if name != RANK else "out" for name in h_names]
    precision, dtype = params["precision"], params["preferred_element_type"]
    b = b.reshape(groups, -1, rank)
    y = contract(h.astype(b.dtype), h_names, b, ["group", "out", RANK], out_names, precision, dtype)
    return y.reshape(*y.shape[:channel], -1, *y.shape[channel + 2 :])
