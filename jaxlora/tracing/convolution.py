"""The rule for convolutions: one to or from rank channels, and a product over the channels.

The factors of a kernel ``(*window, in / groups, out)`` are ``a`` ``(*window, in / groups, rank)``
and ``b`` ``(rank, out)``. The input is convolved with ``a`` and the result multiplied with ``b``;
where a convolution runs the other way, as in a decoder that shares its kernel with the encoder,
the input is multiplied with ``b`` and the result convolved with ``a``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing import compat
from jaxlora.tracing.interpreter import CONTRACTED, Walk, rule
from jaxlora.tracing.lowrank import RANK, LowRank, Role
from jaxlora.tracing.product import contract, named

_OWN = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")


@rule("conv_general_dilated")
def convolution(walk: Walk, eqn: Any, x: Any, kernel: Any) -> list[Any]:
    """Add the convolution by the factors.

    With groups, each group's input is convolved with the same ``a`` and multiplied with its own
    part of ``b``, which is what the factors of the grouped kernel mean. Kernels that are a stack,
    with a group for each entry (as `jax.vmap` makes them), have factors for each.
    """
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    x = walk.densify(eqn, x, "the weight is convolved with, not by")
    if not isinstance(kernel, LowRank):
        return compat.bind(eqn, [x, kernel])
    out_dim, in_dim, *window = numbers.rhs_spec
    groups = params["feature_group_count"]
    stack, out = _stack_and_out(kernel, out_dim, groups)
    in_ = kernel.labels(in_dim, *window)
    runs_back = not kernel.is_probe and Role.OUT in in_
    if params["batch_group_count"] != 1:
        return walk.without_rule(eqn, [x, kernel], "it has batch groups")
    fits = not in_ & out if kernel.is_probe else _fits(kernel, numbers, stack, out, groups)
    if not fits:
        return walk.without_rule(eqn, [x, kernel], "its axes have other roles elsewhere")
    walk.record(eqn, kernel, CONTRACTED, in_=in_, out=out, stack=stack | kernel.indexed - in_ - out)
    (y,) = compat.bind(eqn, [x, kernel.base])
    if kernel.is_probe:
        return [y]
    with jax.named_scope("lora"):
        product = _from_rank if runs_back else _to_rank
        return [y + product(params, kernel.input(x), kernel).astype(y.dtype)]


def _stack_and_out(kernel: LowRank, out_dim: int, groups: int) -> tuple[frozenset, frozenset]:
    """Return the labels of the kernel's channels: those of a group each, and the others."""
    labels, count, stack = kernel.labels(out_dim), 1, frozenset()
    if not kernel.is_probe:
        return labels & {Role.STACK}, labels - {Role.STACK}
    for label, size in kernel.dims[out_dim][:-1]:
        if groups % (count * size) == 0:
            count, stack = count * size, stack | label
    return stack, labels - stack


def _fits(kernel: LowRank, numbers: Any, stack: frozenset, out: frozenset, groups: int) -> bool:
    """Tell whether the factors are those of a convolution and a product, in either order."""
    out_dim, in_dim, *window = numbers.rhs_spec
    runs_back = kernel.labels(in_dim) == {Role.OUT}
    if runs_back:
        ends = not stack and groups == 1 and out <= {Role.IN}
    else:
        size = _stack_size(kernel, out_dim)
        leads = all(label != Role.STACK for label, _ in kernel.dims[out_dim][1:])
        ends = leads and (groups == 1 or groups % size == 0) and out <= {Role.OUT}
        ends = ends and kernel.labels(in_dim) <= {Role.IN}
    return ends and kernel.labels(*window) <= {Role.IN}


def _stack_size(kernel: LowRank, out_dim: int) -> int:
    return math.prod(size for label, size in kernel.dims[out_dim] if label == Role.STACK)


def _to_rank(params: Any, x: Any, kernel: LowRank) -> Any:
    """Return the product of ``b`` with the convolution of ``x`` by ``a``."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_dim, channel = numbers.rhs_spec[0], numbers.out_spec[1]
    stack = _stack_size(kernel, out_dim)
    copies = max(groups // stack, 1)
    a, b = kernel.factors(kernel.base.dtype)
    window = [kernel.base.shape[d] for d in range(kernel.base.ndim) if d != out_dim]
    before = math.prod(window[:out_dim])
    a = a.reshape(before, stack, -1, kernel.rank).transpose(0, 2, 1, 3)
    a = a.reshape(*window, stack, 1, kernel.rank)
    a = jnp.broadcast_to(a, (*window, stack, copies, kernel.rank)).reshape(*window, -1)
    h = named(_convolved(params, x, jnp.moveaxis(a, -1, out_dim), groups))
    h = h.reshape(*h.shape[:channel], stack, copies, -1, *h.shape[channel + 1 :])
    names: list[Any] = [("h", i) for i in range(h.ndim)]
    names[channel : channel + 3] = ["stack", "copy", RANK]
    wanted = [name if name != RANK else "out" for name in names]
    b = b.reshape(stack, copies, -1, kernel.rank)
    y = _mixed(params, h, names, b, ["stack", "copy", "out", RANK], wanted)
    return y.reshape(*y.shape[:channel], -1, *y.shape[channel + 3 :])


def _from_rank(params: Any, x: Any, kernel: LowRank) -> Any:
    """Return the convolution of the product of ``x`` and ``b`` by ``a``."""
    numbers = params["dimension_numbers"]
    in_dim, channel = numbers.rhs_spec[1], numbers.lhs_spec[1]
    a, b = kernel.factors(kernel.base.dtype)
    names: list[Any] = [("x", i) for i in range(x.ndim)]
    wanted = [name if name != ("x", channel) else RANK for name in names]
    b = b.reshape(x.shape[channel], kernel.rank)
    h = named(_mixed(params, x, names, b, [("x", channel), RANK], wanted))
    shape = [size for d, size in enumerate(kernel.base.shape) if d != in_dim]
    a = jnp.moveaxis(a.reshape(*shape, kernel.rank), -1, in_dim)
    return _convolved(params, h.astype(a.dtype), a, 1)


def _mixed(params: Any, x: Any, x_names: Any, b: Any, b_names: Any, out_names: Any) -> Any:
    how = params["precision"], params["preferred_element_type"]
    return contract(x.astype(b.dtype), x_names, b, b_names, out_names, *how)


def _convolved(params: Any, x: Any, kernel: Any, groups: int) -> Any:
    return lax.conv_general_dilated(
        x,
        kernel,
        dimension_numbers=params["dimension_numbers"],
        feature_group_count=groups,
        preferred_element_type=params["preferred_element_type"],
        **{name: params[name] for name in _OWN},
    )
