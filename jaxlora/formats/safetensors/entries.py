"""The tensors of a checkpoint as parts of leaves."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxlora.formats import layouts, pieces
from jaxlora.formats.names import Names, Place
from jaxlora.formats.pieces import Box
from jaxlora.messages import checks
from jaxlora.storage import locations
from jaxlora.targets.sites import Sites
from jaxlora.types import Leaf, Leaves
from jaxlora.weights.roles import Roles


@dataclasses.dataclass(frozen=True)
class Entry:
    """A part of a leaf that is one tensor, or one for several weights along its first axis.

    Attributes:
        place: the leaf and the part.
        box: the part along every axis of the leaf.
        roles: roles of the leaf's axes, None where it is no weight.
    """

    place: Place
    box: Box
    roles: Roles | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def index(self) -> tuple[slice, ...]:
        """The part as an index of the leaf."""
        return tuple(slice(*bounds) for bounds in self.box)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        part = self.place.part or [None] * len(self.box)
        if self.roles is None:  # its shape without the axes that have an index
            pairs = zip(part, self.shape, strict=True)
            return tuple(size for bounds, size in pairs if bounds is None or size > 1)
        one = layouts.weight_shape(self.roles, self._one, self.place.layout)
        return one if self.count == 1 else (self.count, *one)

    @property
    def count(self) -> int:
        """Number of weights in the part."""
        return math.prod(self.roles.sizes(self.shape)[0]) if self.roles else 1

    @property
    def _one(self) -> tuple[int, ...]:
        """Shape of one entry of the stack."""
        stack = self.roles.stack if self.roles else ()
        return tuple(1 if axis in stack else size for axis, size in enumerate(self.shape))

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Return the part of the leaf."""
        if self.roles is None:
            return tensor.reshape(self.shape)
        how = (self.roles, self._one, self.place.layout)
        found = [layouts.weight(x, *how) for x in tensor.reshape(self.count, *self._matrix)]
        return np.stack(found).reshape(self.shape) if len(found) > 1 else found[0]

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """Return the tensor of a leaf; the opposite of `from_tensor`."""
        part = leaf[self.index]
        if self.roles is None:
            return part.reshape(self.tensor_shape)
        stack = [part.shape[axis] for axis in self.roles.stack]
        rows = np.moveaxis(part, self.roles.stack, range(len(stack))).reshape(self.count, -1)
        found = [layouts.tensor(x.reshape(self._one), self.roles, self.place.layout) for x in rows]
        return np.stack(found).reshape(self.tensor_shape)

    @property
    def _matrix(self) -> tuple[int, ...]:
        shape = self.tensor_shape
        return shape if self.count == 1 else shape[1:]


def entries(leaves: Leaves, names: Names, sites: Sites) -> dict[str, Entry]:
    """Return every name of a tree, and what of it the tensor is."""
    known = sites.sites | sites.dense
    found = {}
    for name, place in names.table({path: leaf.shape for path, leaf in leaves.items()}).items():
        roles = known[place.path].roles if place.path in known else None
        found[name] = Entry(place, pieces.box(place.part, leaves[place.path].shape), roles)
    return found


def check_whole(path: str, leaf: Leaf, own: Mapping[str, Entry], what: str) -> None:
    """Raise if the parts of a leaf that have a tensor are not all of it."""
    held = sum(math.prod(entry.shape) for entry in own.values())
    if held != math.prod(leaf.shape):
        raise ValueError(
            f"every element of the leaf {path!r} of shape {tuple(leaf.shape)} must {what}: "
            f"got {held} of {math.prod(leaf.shape)}, from {sorted(own)[:5] or 'no name'}"
        )


def check(names: object, sites: object) -> None:
    """Raise if these are no names and sites."""
    if not isinstance(names, Names):
        raise TypeError(f"names must be a jaxlora.formats.Names: got {checks.shown(names)}")
    if not isinstance(sites, Sites):
        raise TypeError(f"sites must be from jaxlora.find_sites: got {checks.shown(sites)}")


def local(path: locations.PathLike) -> Path:
    """Return a path of this machine, or raise for one in a bucket."""
    found = locations.resolve(path)
    if not locations.is_local(found):
        raise ValueError(f"the path must be a local one: got {str(found)!r}")
    return found
