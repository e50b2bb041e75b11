"""How weights and factors lie in PyTorch's tensors, and how in a leaf of a tree.

The roles of a leaf's axes tell which of them are in and which out axes, so one reshape serves
every model: ``(out, in)`` there is ``(*out, *in)`` here, in the order of the leaf's axes. Arrays
are NumPy's or JAX's.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from jaxlora.formats.names.mapping import Place
from jaxlora.formats.names.pairs import Layout
from jaxlora.targets.sites import Sites
from jaxlora.tracing.recorder import Kind
from jaxlora.weights.roles import Roles

Array = TypeVar("Array", np.ndarray, jax.Array)
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How the axes of a weight lie in a tensor.

    Attributes:
        roles: roles of its axes.
        layout: how the module's weight lies in the file.
        channel: of a kernel the axis of the input's channels.
        window: its axes along the window of the convolution, in the order of its dimensions.
    """

    roles: Roles
    layout: Layout
    channel: int | None = None
    window: Shape = ()

    def factor_shapes(self, shape: Sequence[int], rank: int) -> tuple[Shape, Shape]:
        """Return the shapes that the tensors of ``A`` and ``B`` have for an entry of a stack."""
        _, in_, out = self.roles.sizes(shape)
        if self.layout != "conv":
            return (rank, math.prod(in_)), (math.prod(out), rank)
        channel, *window = (shape[axis] for axis in self._in())
        return (rank, channel, *window), (math.prod(out), rank, *(1 for _ in window))

    def factors(self, first: Array, second: Array, shape: Sequence[int]) -> tuple[Array, Array]:
        """Return ``a``, ``(*in, rank)``, and ``b``, ``(rank, *out)``, of two tensors."""
        _, _, out = self.roles.sizes(shape)
        rank, order = first.shape[0], self._in()
        a = first.reshape(rank, *(shape[axis] for axis in order))
        a = a.transpose([*(1 + order.index(axis) for axis in self.roles.in_), 0])
        b = second.reshape(*out, rank)
        return a, b.transpose([b.ndim - 1, *range(b.ndim - 1)])

    def tensors(self, a: Array, b: Array, shape: Sequence[int]) -> tuple[Array, Array]:
        """Return the two tensors of ``a`` and ``b``; the opposite of `factors`."""
        first_shape, second_shape = self.factor_shapes(shape, a.shape[-1])
        a = a.transpose([a.ndim - 1, *(self.roles.in_.index(axis) for axis in self._in())])
        return a.reshape(first_shape), b.transpose([*range(1, b.ndim), 0]).reshape(second_shape)

    def weight_shape(self, shape: Sequence[int]) -> Shape:
        """Return the shape of the tensor of a part; of several entries it is of these, first."""
        stack, in_, out = self.roles.sizes(shape)
        count = (math.prod(stack),) if math.prod(stack) > 1 else ()
        match self.layout:
            case "conv":
                return (*count, math.prod(out), *(shape[axis] for axis in self._in()))
            case "linear":
                return (*count, math.prod(out), math.prod(in_))
        return (*count, math.prod(in_), math.prod(out))

    def weight(self, tensor: Array, shape: Sequence[int]) -> Array:
        """Return a part of a leaf, of this shape, from its tensor."""
        order = self.order()
        split = tensor.reshape([shape[axis] for axis in order])
        return split.transpose(sorted(range(len(order)), key=order.__getitem__))

    def tensor(self, part: Array) -> Array:
        """Return the tensor of a part; the opposite of `weight`."""
        return part.transpose(self.order()).reshape(self.weight_shape(part.shape))

    def order(self) -> Shape:
        """Return the axes of the leaf in the order in which a tensor has them."""
        sides = (self.roles.out, self._in())
        is_out_first = self.layout in ("linear", "conv")
        return (*self.roles.stack, *(sides[0] + sides[1] if is_out_first else sides[1] + sides[0]))

    def _in(self) -> Shape:
        """Return the in axes in the order in which a tensor has them."""
        if self.layout != "conv" or self.channel is None:
            return self.roles.in_
        return (self.channel, *self.window)


def arrangement(sites: Sites, place: Place, shape: Sequence[int]) -> Arrangement | None:
    """Return how a leaf of some shape lies in tensors, None where it is a vector or lies as there.

    Raises:
        ValueError: sites are those of another tree, or do not tell.
    """
    told = sites.shapes.get(place.path)
    if told is None or tuple(told) != tuple(shape):
        raise ValueError(
            f"sites must be of this tree: the leaf {place.path!r} has the shape {tuple(shape)}, "
            f"and there {'none' if told is None else tuple(told)}"
        )
    if place.layout == "tensor":
        return None
    site = sites.sites.get(place.path)
    if site is not None:
        windows = {use.window for use in site.uses if use.window}
        window = windows.pop() if len(windows) == 1 else ()
        axes = tuple(axis for axis in site.roles.in_ if axis in window)
        channels = [axis for axis in site.roles.in_ if axis not in window]
        channel = channels[0] if axes and len(channels) == 1 else None
        if place.layout == "conv" and channel is None:
            raise ValueError(
                f"the layout of {str(place)!r} is 'conv', and no convolution in the program tells "
                "which of its axes are the window"
            )
        return Arrangement(site.roles, place.layout, channel, tuple(sorted(axes, key=window.index)))
    sizes = [size for axis, size in enumerate(shape) if axis not in place.indexed and size > 1]
    if len(sizes) > 1 and place.layout != "embedding" and not place.is_bias:
        raise ValueError(
            f"the program does not tell how the leaf {place.path!r} lies: "
            f"{sites.skipped.get(place.path, 'it is no weight')}; if it lies in the file as in the "
            "tree, its layout in the names is 'embedding', or 'tensor' of what is no module's"
        )
    return None


def check_untied(sites: Sites, place: Place, where: str) -> None:
    """Raise for a leaf that is looked up and multiplied, which are two tensors in PEFT."""
    site = sites.sites.get(place.path)
    is_multiplied = site is not None and any(use.kind == Kind.CONTRACTED for use in site.uses)
    if site is not None and site.is_looked_up and is_multiplied:
        raise ValueError(
            f"the leaf {place.path!r} is looked up and multiplied, and PEFT changes one of the two "
            f"alone, for {where}: a leaf for each is needed"
        )
