"""A file of tensors that is open, and the tree that it is read for."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxlora.formats import pieces
from jaxlora.formats.layouts import Arrangement, arrangement
from jaxlora.formats.names.mapping import Place, missing
from jaxlora.formats.pieces import Box
from jaxlora.formats.tensors import TensorFile
from jaxlora.targets.sites import Sites
from jaxlora.weights import blocks

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file that is being read.

    Attributes:
        file: its tensors.
        sites: where adapters can go in the tree.
        table: every name that the tree has, and its place.
    """

    file: TensorFile
    sites: Sites
    table: Mapping[str, Place]

    @property
    def where(self) -> str:
        """The file, as errors name it."""
        return repr(str(self.file.path))

    def add(self, own: dict[str, str], kind: str, tensor: str, module: str) -> None:
        """Put a tensor among those of its module by kind, or raise if there is one of its kind."""
        if (known := own.setdefault(kind, tensor)) != tensor:
            raise ValueError(
                f"{self.where} has two tensors {kind} of {module!r}: {known!r} and {tensor!r}"
            )

    def place(self, name: str, tensor: str) -> Place:
        """Return the place of a name, or raise where the tree has none for its tensor."""
        if (place := self.table.get(name)) is None:
            raise ValueError(
                f"the tensor {tensor!r} of {self.where} has no place: {missing(name, self.table)}"
            )
        return place

    def arrangement(self, place: Place) -> Arrangement | None:
        """Return how a leaf lies in tensors, None where it is no weight."""
        return arrangement(self.sites, place, self.whole(place))

    def whole(self, place: Place) -> Shape:
        """Return the shape of the leaf of a place."""
        return tuple(self.sites.shapes[place.path])

    def box(self, place: Place) -> tuple[Box, Shape]:
        """Return the bounds of a place along every axis of its leaf, and its shape."""
        whole = self.whole(place)
        return pieces.box(place.part, whole), blocks.shape(place.part, whole)

    def tensor(self, name: str, place: Place, shape: Shape) -> np.ndarray:
        """Return a tensor, or raise if it does not have the shape that its place needs.

        Axes of size 1 may be missing at its end, or be too many there: a convolution with a window
        of one element is a product.
        """
        got = self.file.shapes[name]
        if 0 in got:
            raise ValueError(f"the tensor {name!r} of {self.where} is empty: got the shape {got}")
        if _without_ones(got) != _without_ones(shape):
            raise ValueError(
                f"the tensor {name!r} of {self.where} must have the shape {shape} for "
                f"{str(place)!r} as a module of the layout {place.layout!r}: got {got}"
            )
        return self._floating(name).reshape(shape)

    def flat(self, name: str, place: Place, shape: Shape) -> np.ndarray:
        """Return a tensor in a shape, or raise if it does not have as many elements."""
        got = self.file.shapes[name]
        if math.prod(got) != math.prod(shape):
            raise ValueError(
                f"the tensor {name!r} of {self.where} must have {math.prod(shape)} elements "
                f"for {str(place)!r}, as {shape}: got {got}"
            )
        return self._floating(name).reshape(shape)

    def _floating(self, name: str) -> np.ndarray:
        """Return a tensor, or raise if it is none that can be trained as it is."""
        tensor = self.file[name]
        is_floating = jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)
        if not is_floating or jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
            raise ValueError(
                f"the tensor {name!r} of {self.where} must be floating, and of 64 bits only "
                f"with jax_enable_x64: got {tensor.dtype}"
            )
        return tensor


def _without_ones(shape: Shape) -> Shape:
    """Return a shape without the axes of size 1 at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
