"""How weights and factors lie in PyTorch's tensors, and how in a leaf of a tree.

The roles of a leaf's axes tell which of them are in and which out axes, so one reshape serves
every model: ``(out, in)`` there is ``(*out, *in)`` here, in the order of the leaf's axes. Arrays
are NumPy's, and those of one entry of a stack: its axes have size 1 and no place there.
"""

import math
from collections.abc import Sequence

import numpy as np

from jaxlora.formats.names import Layout
from jaxlora.weights.roles import Roles

Array = np.ndarray


def sizes(roles: Roles, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the in and of the out axes."""
    _, in_, out = roles.sizes(shape)
    return in_, out


def factor_shapes(
    roles: Roles, shape: Sequence[int], rank: int, layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes that the tensors of ``A`` and ``B`` have for a weight of some shape."""
    in_, out = sizes(roles, shape)
    if layout != "conv":
        return (rank, math.prod(in_)), (math.prod(out), rank)
    channels, window = _split_window(roles, in_)
    return (rank, channels, *window), (math.prod(out), rank, *(1 for _ in window))


def factors(
    first: Array, second: Array, roles: Roles, shape: Sequence[int], layout: Layout
) -> tuple[Array, Array]:
    """Return ``a``, ``(*in, rank)``, and ``b``, ``(rank, *out)``, of two tensors."""
    in_, out = sizes(roles, shape)
    if layout == "conv" and not _is_out_first(roles):
        first = np.moveaxis(first, 1, -1)
    rank = first.shape[0]
    a = np.moveaxis(first.reshape(rank, *in_), 0, -1)
    return a, np.moveaxis(second.reshape(*out, rank), -1, 0)


def tensors(
    a: Array, b: Array, roles: Roles, shape: Sequence[int], layout: Layout
) -> tuple[Array, Array]:
    """Return the two tensors of ``a`` and ``b``; the opposite of `factors`."""
    rank = a.shape[-1]
    first_shape, second_shape = factor_shapes(roles, shape, rank, layout)
    first, second = np.moveaxis(a, -1, 0), np.moveaxis(b, 0, -1)
    if layout == "conv" and not _is_out_first(roles):
        first = np.moveaxis(first, -1, 1)
    return first.reshape(first_shape), second.reshape(second_shape)


def weight_shape(roles: Roles | None, shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Return the shape that the tensor of a weight has, of an entry of a leaf of some shape.

    Args:
        roles: roles of the leaf's axes, None where it is no weight.
        shape: shape of the entry.
        layout: how it lies.
    """
    if roles is None:
        return tuple(shape)
    in_, out = sizes(roles, shape)
    match layout:
        case "conv":
            channels, window = _split_window(roles, in_)
            return (math.prod(out), channels, *window)
        case "linear":
            return (math.prod(out), math.prod(in_))
    return (math.prod(in_), math.prod(out))


def weight(tensor: Array, roles: Roles | None, shape: Sequence[int], layout: Layout) -> Array:
    """Return an entry of a leaf, of this shape, from the tensor of a weight."""
    if roles is None:
        return tensor.reshape(shape)
    in_, out = sizes(roles, shape)
    if layout == "conv" and not _is_out_first(roles):
        tensor = np.moveaxis(tensor, 1, -1)
    is_out_first = layout in ("linear", "conv")
    order = (*roles.out, *roles.in_) if is_out_first else (*roles.in_, *roles.out)
    split = tensor.reshape(*out, *in_) if is_out_first else tensor.reshape(*in_, *out)
    return split.transpose(np.argsort(order)).reshape(shape)


def tensor(value: Array, roles: Roles, layout: Layout) -> Array:
    """Return the tensor of an entry of a weight; the opposite of `weight`."""
    is_out_first = layout in ("linear", "conv")
    order = (*roles.out, *roles.in_) if is_out_first else (*roles.in_, *roles.out)
    shape = weight_shape(roles, value.shape, layout)
    value = value.transpose(*roles.stack, *order)
    if layout == "conv" and not _is_out_first(roles):
        value = np.moveaxis(value, -1, len(roles.stack) + len(roles.out))
    return value.reshape(shape)


def _is_out_first(roles: Roles) -> bool:
    """Tell whether a kernel has its out axis first, and so its channels before its window."""
    return roles.out < roles.in_


def _split_window(roles: Roles, in_: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the number of input channels and the window of a kernel."""
    return (in_[0], in_[1:]) if _is_out_first(roles) else (in_[-1], in_[:-1])
