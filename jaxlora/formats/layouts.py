"""How weights and factors lie in PyTorch's tensors, and how in a leaf of a tree.

The roles of a leaf's axes tell which of them are in and which out axes, so one reshape serves
every model: ``(out, in)`` there is ``(*out, *in)`` here, in the order of the leaf's axes. Arrays
are those of one entry of a stack, whose axes have size 1 and no place there; NumPy's or JAX's.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from jaxlora.formats.names import Layout
from jaxlora.weights.roles import Roles

Array = TypeVar("Array", np.ndarray, jax.Array)


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
        first = _moved(first, 1, -1)
    rank = first.shape[0]
    a = _moved(first.reshape(rank, *in_), 0, -1)
    return a, _moved(second.reshape(*out, rank), -1, 0)


def tensors(
    a: Array, b: Array, roles: Roles, shape: Sequence[int], layout: Layout
) -> tuple[Array, Array]:
    """Return the two tensors of ``a`` and ``b``; the opposite of `factors`."""
    rank = a.shape[-1]
    first_shape, second_shape = factor_shapes(roles, shape, rank, layout)
    first, second = _moved(a, -1, 0), _moved(b, 0, -1)
    if layout == "conv" and not _is_out_first(roles):
        first = _moved(first, -1, 1)
    return first.reshape(first_shape), second.reshape(second_shape)


def weight_shape(roles: Roles | None, shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Return the shape that the tensor of a weight has, of a part of a leaf.

    Args:
        roles: roles of the leaf's axes, None where it is no weight.
        shape: shape of the part. If it has several entries of a stack, so has the tensor, first.
        layout: how it lies.
    """
    if roles is None:
        return tuple(shape)
    stack, in_, out = roles.sizes(shape)
    count = (math.prod(stack),) if math.prod(stack) > 1 else ()
    match layout:
        case "conv":
            channels, window = _split_window(roles, in_)
            return (*count, math.prod(out), channels, *window)
        case "linear":
            return (*count, math.prod(out), math.prod(in_))
    return (*count, math.prod(in_), math.prod(out))


def weight(tensor: Array, roles: Roles | None, shape: Sequence[int], layout: Layout) -> Array:
    """Return a part of a leaf, of this shape, from the tensor of a weight."""
    if roles is None:
        return tensor.reshape(shape)
    if layout == "conv" and not _is_out_first(roles):
        tensor = _moved(tensor, -1 - len(roles.in_) + 1, -1)
    order = _order(roles, layout)
    split = tensor.reshape([shape[axis] for axis in order])
    return split.transpose(sorted(range(len(order)), key=order.__getitem__))


def tensor(value: Array, roles: Roles | None, layout: Layout) -> Array:
    """Return the tensor of a part of a leaf; the opposite of `weight`."""
    shape = weight_shape(roles, value.shape, layout)
    if roles is None:
        return value.reshape(shape)
    value = value.transpose(_order(roles, layout))
    if layout == "conv" and not _is_out_first(roles):
        value = _moved(value, -1, len(roles.stack) + len(roles.out))
    return value.reshape(shape)


def _order(roles: Roles, layout: Layout) -> tuple[int, ...]:
    """Return the axes of a leaf in the order in which a tensor has them."""
    is_out_first = layout in ("linear", "conv")
    sides = (roles.out, roles.in_) if is_out_first else (roles.in_, roles.out)
    return (*roles.stack, *sides[0], *sides[1])


def _moved(array: Array, axis: int, to: int) -> Array:
    """Return an array with one axis in another place."""
    axes = [*range(array.ndim)]
    moved = axes.pop(axis)
    axes.insert(to % array.ndim, moved)
    return array.transpose(axes)


def _is_out_first(roles: Roles) -> bool:
    """Tell whether a kernel has its out axis first, and so its channels before its window."""
    return roles.out < roles.in_


def _split_window(roles: Roles, in_: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the number of input channels and the window of a kernel."""
    return (in_[0], in_[1:]) if _is_out_first(roles) else (in_[-1], in_[:-1])
