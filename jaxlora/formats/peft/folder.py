"""A folder of PEFT that is open, and the tree that it is read for."""

import collections
import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxlora.formats import pieces
from jaxlora.formats.layouts import Arrangement, arrangement
from jaxlora.formats.names import Place, missing
from jaxlora.formats.peft.config import Config
from jaxlora.formats.peft.keys import Key, parse_all
from jaxlora.formats.pieces import Box
from jaxlora.formats.tensors import TensorFile
from jaxlora.targets.sites import Sites
from jaxlora.weights import blocks

ModuleKey = tuple[str, int]  # its name, and in how many adapted ones it stands


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that is being read.

    Attributes:
        config: its config.
        file: its tensors.
        sites: where adapters can go in the tree.
        table: every name that the tree has, and its place.
    """

    config: Config
    file: TensorFile
    sites: Sites
    table: Mapping[str, Place]

    @property
    def where(self) -> str:
        """The file of its tensors, as errors name it."""
        return repr(str(self.file.path))

    def keys(self) -> tuple[dict[ModuleKey, dict[str, Key]], list[Key], list[Key]]:
        """Return its tensors: the factors of each module, values, and rows of tokens."""
        modules: dict[ModuleKey, dict[str, Key]] = collections.defaultdict(dict)
        others: dict[str, list[Key]] = {"value": [], "tokens": []}
        for key in parse_all(self.file.shapes, self.where):
            if key.kind in others:
                others[key.kind].append(key)
            elif (known := modules[key.module, key.depth].setdefault(key.kind, key)) != key:
                raise ValueError(
                    f"{self.where} has two tensors {key.kind} of {key.module!r}: {known.name!r} "
                    f"and {key.name!r}"
                )
        for own in modules.values():
            for kind, other in (("A", "B"), ("B", "A"), ("magnitude", "A")):
                if kind in own and other not in own:
                    raise ValueError(
                        f"{self.where} has {own[kind].name!r}, and no tensor {other} beside it"
                    )
        return modules, others["value"], others["tokens"]

    def place(self, name: str, key: Key) -> Place:
        """Return the place of a name, or raise where the tree does not have it."""
        if (place := self.table.get(name)) is None:
            raise ValueError(
                f"the tensor {key.name!r} of {self.where} has no place: {missing(name, self.table)}"
            )
        return place

    def arrangement(self, place: Place) -> Arrangement | None:
        """Return how a leaf lies in tensors, None where it is no weight."""
        return arrangement(self.sites, place, self.whole(place))

    def whole(self, place: Place) -> tuple[int, ...]:
        """Return the shape of the leaf of a place."""
        return tuple(self.sites.shapes[place.path])

    def box(self, place: Place) -> tuple[Box, tuple[int, ...]]:
        """Return the bounds of a place along every axis of its leaf, and its shape."""
        whole = self.whole(place)
        return pieces.box(place.part, whole), blocks.shape(place.part, whole)

    def tensor(self, key: Key, place: Place, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor, or raise if it does not have the shape that its place needs."""
        got = self.file.shapes[key.name]
        if got != shape or 0 in shape:
            raise ValueError(
                f"the tensor {key.name!r} of {self.where} must have the shape {shape} for "
                f"{str(place)!r} as a module of the layout {place.layout!r}: got {got}"
            )
        return self._floating(key)

    def flat(self, key: Key, place: Place, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor in a shape, or raise if it does not have as many elements."""
        got = self.file.shapes[key.name]
        if math.prod(got) != math.prod(shape):
            raise ValueError(
                f"the tensor {key.name!r} of {self.where} must have {math.prod(shape)} elements "
                f"for {str(place)!r}, as {shape}: got {got}"
            )
        return self._floating(key).reshape(shape)

    def _floating(self, key: Key) -> np.ndarray:
        """Return a tensor, or raise if it is none that can be trained as it is."""
        tensor = self.file[key.name]
        is_floating = jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)
        if not is_floating or jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
            raise ValueError(
                f"the tensor {key.name!r} of {self.where} must be floating, and of 64 bits only "
                f"with jax_enable_x64: got {tensor.dtype}"
            )
        return tensor
