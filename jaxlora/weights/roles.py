"""Which axes of a weight are stack, in and out axes, and which of them its factors carry.

With the axes of a weight split into *stack*, *in* and *out* axes, factors of some rank have the
shapes ``a: (*stack, *in, rank)`` and ``b: (*stack, rank, *out)``. The program tells the roles, see
`jaxlora.find_sites`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

from jaxlora.weights.blocks import Part
from jaxlora.weights.sharding import Axes

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Roles:
    """The role of each axis of a weight; each axis is named once, in increasing order.

    Attributes:
        stack: axes along which the weight is a stack of weights (layers, experts), each with
            factors of its own.
        in_: axes that the program contracts with an input, or looks rows up along.
        out: the other axes, which appear in the output.
    """

    stack: tuple[int, ...]
    in_: tuple[int, ...]
    out: tuple[int, ...]

    def __post_init__(self) -> None:
        groups = (self.stack, self.in_, self.out)
        named = [axis for group in groups for axis in group]
        if sorted(named) != list(range(len(named))):
            raise ValueError(f"roles must name every axis once: got {self}")
        if any(list(group) != sorted(group) for group in groups):
            raise ValueError(f"axes of one role must be in increasing order: got {self}")

    def labels(self, stack: T, in_: T, out: T) -> list[T]:
        """Return for each axis the label of its role."""
        label = dict.fromkeys(self.stack, stack) | dict.fromkeys(self.in_, in_)
        label |= dict.fromkeys(self.out, out)
        return [label[axis] for axis in range(len(label))]

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the sizes of the (stack, in, out) axes of a weight of this shape."""
        return tuple([tuple([shape[i] for i in axes]) for axes in (self.stack, self.in_, self.out)])

    def factor_shapes(
        self, shape: Sequence[int], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a, ``(*stack, *in, rank)``, and b, ``(*stack, rank, *out)``."""
        stack, in_, out = self.sizes(shape)
        return (*stack, *in_, rank), (*stack, rank, *out)

    def magnitude_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (*stack, *out) of the magnitude."""
        stack, _, out = self.sizes(shape)
        return (*stack, *out)

    def max_rank(self, shape: Sequence[int]) -> int:
        """Return the smaller side, prod(in) or prod(out): a rank above it adds nothing."""
        _, in_, out = self.sizes(shape)
        return min(math.prod(in_), math.prod(out))


def factor_axes(roles: Roles, part: Part | None = None) -> tuple[Axes, Axes, Axes]:
    """Return for each dimension of ``a``, of ``b`` and of a magnitude its axis of the base.

    Args:
        roles: roles of the base's axes.
        part: the part of the base that the factors are for.

    Returns:
        Axes; None for the rank, and for an axis of which the factors have a part.
    """
    cut = {axis for axis, bounds in enumerate(part or ()) if bounds}

    def whole(*axes):
        return tuple(None if axis in cut else axis for axis in axes)

    b = whole(*roles.stack, None, *roles.out)
    return whole(*roles.stack, *roles.in_, None), b, whole(*roles.stack, *roles.out)
