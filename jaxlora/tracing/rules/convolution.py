"""The rule for convolutions: one to or from rank channels, and a product over the channels.

The factors of a kernel ``(*window, in / groups, out)`` are ``a`` ``(*window, in / groups, rank)``
and ``b`` ``(rank, out)``. The input is convolved with ``a`` and the result multiplied with ``b``;
where a convolution runs the other way, as in a decoder that shares its kernel with the encoder,
the input is multiplied with ``b`` and the result convolved with ``a``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Params
from jaxlora.tracing.recorder import Facts, Kind
from jaxlora.tracing.registry import rule
from jaxlora.tracing.types import Eqn, Operand, Values
from jaxlora.tracing.values import axes
from jaxlora.tracing.values.chain import Name, contract
from jaxlora.tracing.values.lowrank import RANK, LowRank
from jaxlora.tracing.values.scaling import scaled_along
from jaxlora.tracing.values.weight import Role, Weight

_OWN = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")


def _flops(eqn: Eqn) -> int:
    kernel, numbers = eqn.invars[1], eqn.params["dimension_numbers"]
    channels = compat.shape(kernel)[numbers.rhs_spec[0]]
    return 2 * compat.size(eqn.outvars[0]) * compat.size(kernel) // channels


Names = Sequence[Name]


@rule("conv_general_dilated", is_product=True, flops=_flops)
def convolution(run: Evaluation, eqn: Eqn, x: Operand, kernel: Operand) -> Values:
    """Add the convolution by the factors.

    With groups, each group's input is convolved with the same ``a`` and multiplied with its own
    part of ``b``, which is what the factors of the grouped kernel mean. Kernels that are a stack,
    with a group for each entry (as `jax.vmap` makes them), have factors for each.
    """
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    x = run.densify(eqn, x, "the weight is convolved with, not by")
    if not isinstance(kernel, Weight):
        return compat.bind(eqn, [x, kernel])
    out_dim, in_dim, *window = numbers.rhs_spec
    groups = params["feature_group_count"]
    stack, out = _stack_and_out(kernel, out_dim, groups)
    in_ = kernel.labels(in_dim, *window)
    if params["batch_group_count"] != 1:
        return run.without_rule(eqn, [x, kernel], "it has batch groups")
    is_sought = not isinstance(kernel, LowRank)
    fits = not (in_ & out) if is_sought else _fits(kernel, numbers, groups)
    if not fits:
        return run.without_rule(eqn, [x, kernel], "its axes have other roles elsewhere")
    if not is_sought and kernel.gain is not None and _runs_back(kernel, numbers):
        return run.without_rule(eqn, [x, kernel], "it sums columns that have magnitudes")
    stack |= kernel.indexed - (in_ | out)  # entries that were picked are a stack
    is_transpose = any(size != 1 for size in params["lhs_dilation"])
    sides = sorted(zip(numbers.lhs_spec[2:], window, strict=True))  # as the input has them
    sides = [] if is_transpose else [kernel.labels(dim) for _, dim in sides]
    facts: Facts = {"in_": in_, "out": out, "stack": stack, "window": sides}
    run.record(eqn, kernel, Kind.CONTRACTED, **facts)
    y = run.product(lambda *values: compat.bind(eqn, values)[0], x, kernel.base)
    if is_sought:
        return [y]
    with run.scope(kernel):
        return [_with_term(run, params, x, kernel, y)]


def _with_term(
    run: Evaluation, params: Params, x: jax.Array, kernel: LowRank, y: jax.Array
) -> jax.Array:
    """Return the convolution y by the base plus that by the factors, times the gain."""
    numbers = params["dimension_numbers"]
    order, channel = numbers.rhs_spec, numbers.out_spec[1]
    convolve = _from_rank if _runs_back(kernel, numbers) else _to_rank
    in_order = lax.ConvDimensionNumbers(
        numbers.lhs_spec, tuple(range(kernel.base.ndim)), numbers.out_spec
    )
    shape = jax.ShapeDtypeStruct([kernel.base.shape[d] for d in order], kernel.base.dtype)
    kernel = kernel.transposed(shape, order)  # channels first: (out, in, *window)
    y += convolve(run, params, in_order, kernel.input(x), kernel).astype(y.dtype)
    if kernel.gain is None:
        return y
    names, sizes = [[d] for d in range(y.ndim)], [[size] for size in y.shape]
    return scaled_along(y, names, sizes, kernel.gain.reshape(-1), [channel])


def _stack_and_out(kernel: Weight, out_dim: int, groups: int) -> tuple[frozenset, frozenset]:
    """Return the labels of the kernel's channels: those of a group each, and the others."""
    labels, count, stack = kernel.labels(out_dim), 1, frozenset()
    if isinstance(kernel, LowRank):
        return labels & {Role.STACK}, labels - {Role.STACK}
    for label, size in kernel.dims[out_dim][:-1]:
        if groups % (count * size) == 0:
            count, stack = count * size, stack | label
    return stack, labels - stack


def _fits(kernel: LowRank, numbers: lax.ConvDimensionNumbers, groups: int) -> bool:
    """Tell whether the factors are those of a convolution and a product, in either order."""
    out_dim, in_dim, *window = numbers.rhs_spec
    stack, rest = _first_piece(kernel.dims[out_dim], Role.STACK)
    if _runs_back(kernel, numbers):
        split, rest = _first_piece(rest, Role.OUT)
        ends = stack * split == groups and {label for label, _ in rest} <= {Role.IN}
    else:
        ends = (groups == 1 or groups % stack == 0) and {label for label, _ in rest} <= {Role.OUT}
        ends = ends and kernel.labels(in_dim) <= {Role.IN}
    return ends and kernel.labels(*window) <= {Role.IN}


def _runs_back(kernel: LowRank, numbers: lax.ConvDimensionNumbers) -> bool:
    """Tell whether a convolution runs from the out channels of a kernel to its in channels."""
    out_dim, in_dim, *_ = numbers.rhs_spec
    labels = kernel.labels(in_dim)  # none where each group has one channel
    return labels == {Role.OUT} or (not labels and Role.IN in kernel.labels(out_dim))


def _first_piece(dim: axes.Dim, role: Role) -> tuple[int, axes.Dim]:
    """Return the size of the first piece if it is of a role, else 1, and the other pieces."""
    return (dim[0][1], dim[1:]) if dim and dim[0][0] == role else (1, dim)


def _to_rank(
    run: Evaluation,
    params: Params,
    numbers: lax.ConvDimensionNumbers,
    x: jax.Array,
    kernel: LowRank,
) -> jax.Array:
    """Return the product of ``b`` with the convolution of ``x`` by ``a``."""
    groups, channel = params["feature_group_count"], numbers.out_spec[1]
    stack, _ = _first_piece(kernel.dims[0], Role.STACK)
    copies, (_, *window) = max(groups // stack, 1), kernel.base.shape
    a, b = kernel.factors(kernel.base.dtype)
    a = jnp.moveaxis(a.reshape(stack, 1, *window, kernel.rank), -1, 2)
    a = jnp.broadcast_to(a, (stack, copies, kernel.rank, *window)).reshape(-1, *window)
    h = run.named(_convolved(params, numbers, x, a))
    h = h.reshape(*h.shape[:channel], stack, copies, -1, *h.shape[channel + 1 :])
    names: list[Name] = [("h", i) for i in range(h.ndim)]
    names[channel : channel + 3] = ["stack", "copy", RANK]
    wanted = [name if name != RANK else "out" for name in names]
    b = b.reshape(stack, copies, -1, kernel.rank)
    y = _mixed(params, h, names, b, ["stack", "copy", "out", RANK], wanted)
    return y.reshape(*y.shape[:channel], -1, *y.shape[channel + 3 :])


def _from_rank(
    run: Evaluation,
    params: Params,
    numbers: lax.ConvDimensionNumbers,
    x: jax.Array,
    kernel: LowRank,
) -> jax.Array:
    """Return the convolution by ``a`` of the product of ``x`` and ``b``."""
    groups, channel = params["feature_group_count"], numbers.lhs_spec[1]
    stack, _ = _first_piece(kernel.dims[0], Role.STACK)
    window = kernel.base.shape[2:]
    a, b = kernel.factors(kernel.base.dtype)
    x = x.reshape(*x.shape[:channel], groups, -1, *x.shape[channel + 1 :])
    names: list[Name] = [("x", i) for i in range(x.ndim)]
    names[channel : channel + 2] = ["group", "in"]
    wanted = [name if name != "in" else RANK for name in names]
    h = _mixed(params, x, names, b.reshape(groups, -1, kernel.rank), ["group", "in", RANK], wanted)
    h = run.named(h.reshape(*h.shape[:channel], -1, *h.shape[channel + 2 :]))
    a = jnp.moveaxis(a.reshape(stack, 1, -1, *window, kernel.rank), -1, 3)
    a = jnp.broadcast_to(a, (stack, groups // stack, *a.shape[2:])).reshape(-1, *a.shape[3:])
    return _convolved(params, numbers, h.astype(a.dtype), a)


def _mixed(
    params: Params, x: jax.Array, x_names: Names, b: jax.Array, b_names: Names, out_names: Names
) -> jax.Array:
    how = params["precision"], params["preferred_element_type"]
    return contract(x.astype(b.dtype), x_names, b, b_names, out_names, *how)


def _convolved(
    params: Params, numbers: lax.ConvDimensionNumbers, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        dimension_numbers=numbers,
        feature_group_count=params["feature_group_count"],
        preferred_element_type=params["preferred_element_type"],
        **{name: params[name] for name in _OWN},
    )
