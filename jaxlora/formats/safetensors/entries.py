"""The tensors of a checkpoint as parts of leaves."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.formats import pieces
from jaxlora.formats.layouts import Arrangement, arrangement
from jaxlora.formats.names.mapping import Names, Place
from jaxlora.formats.pieces import Box
from jaxlora.messages import checks
from jaxlora.targets.sites import Sites
from jaxlora.types import Leaf, Leaves
from jaxlora.weights import blocks

_ROWS = 2**23  # bytes written at once; memory for many more is new each time, and slow on a CPU


@dataclasses.dataclass(frozen=True)
class Form:
    """How a part of a leaf lies in a tensor.

    Attributes:
        shape: shape of the part.
        plain: shape of the tensor where the leaf is no weight.
        how: how the weight lies, None where it is none.
    """

    shape: tuple[int, ...]
    plain: tuple[int, ...]
    how: Arrangement | None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.plain if self.how is None else self.how.weight_shape(self.shape)

    def part(self, tensor: Leaf) -> Leaf:
        """Return the part of the leaf."""
        return (
            tensor.reshape(self.shape) if self.how is None else self.how.weight(tensor, self.shape)
        )

    def tensor(self, part: Leaf) -> Leaf:
        """Return the tensor; the opposite of `part`."""
        return part.reshape(self.plain) if self.how is None else self.how.tensor(part)

    @property
    def order(self) -> Sequence[int]:
        """The axes of the part in the order in which the tensor has them."""
        return range(len(self.shape)) if self.how is None else self.how.order()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A part of a leaf that is one tensor.

    Attributes:
        place: the leaf and the part.
        box: the part along every axis of the leaf.
        form: how it lies in the tensor.
    """

    place: Place
    box: Box
    form: Form

    @classmethod
    def from_place(cls, place: Place, whole: Sequence[int], sites: Sites) -> "Entry":
        """Return the entry of a place in a leaf of some shape."""
        box, shape = pieces.box(place.part, whole), blocks.shape(place.part, whole)
        plain = tuple(size for axis, size in enumerate(shape) if axis not in place.indexed)
        if place.is_bias:
            plain = (math.prod(shape),)
        return cls(place, box, Form(shape, plain, arrangement(sites, place, whole)))

    @property
    def count(self) -> int:
        """Number of weights in the part."""
        how = self.form.how
        return math.prod(how.roles.sizes(self.form.shape)[0]) if how else 1

    @property
    def index(self) -> tuple[slice, ...]:
        """The part as an index of the leaf."""
        return tuple(slice(*bounds) for bounds in self.box)

    @property
    def starts(self) -> list[int]:
        """Where the part begins along every axis of the leaf."""
        return [start for start, _ in self.box]

    def rows(self, itemsize: int) -> "list[Entry]":
        """Return entries of some rows of the tensor each, in order; few if that can be.

        Args:
            itemsize: bytes of an element.
        """
        shape = self.form.shape
        if math.prod(shape) * itemsize <= _ROWS:
            return [self]
        axis = next(axis for axis in self.form.order if shape[axis] > 1)
        most = _ROWS * shape[axis] // (math.prod(shape) * itemsize)
        size = blocks.largest_divisor(shape[axis], max(1, most))
        if size < most // 16:  # no divisor of the size is near
            return [self]
        starts = range(self.starts[axis], self.starts[axis] + shape[axis], size)
        return [row for i in starts for row in self._along(axis, i, size).rows(itemsize)]

    def _along(self, axis: int, start: int, size: int) -> "Entry":
        """Return the entry of a part of this along an axis."""
        box, shape = list(self.box), list(self.form.shape)
        box[axis], shape[axis] = (start, start + size), size
        form = Form(tuple(shape), (math.prod(shape),), self.form.how)
        return dataclasses.replace(self, box=tuple(box), form=form)

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Return the part of the leaf."""
        if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:  # JAX would cast it
            return self.form.part(tensor)
        return np.asarray(_part(self.form, tensor))

    def to_tensor(self, leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Return the tensor of a leaf; the opposite of `from_tensor`."""
        return self.laid(self.part_of(leaf))

    def part_of(self, leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Return the part of a leaf."""
        if not isinstance(leaf, jax.Array):
            return leaf[self.index]
        return leaf if self.form.shape == leaf.shape else _cut(self.form, leaf, self.starts)

    def laid(self, part: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Return the tensor of the part."""
        return _tensor(self.form, part) if isinstance(part, jax.Array) else self.form.tensor(part)


# under `jax.jit`, which transposes faster than NumPy does; cut apart from it, for XLA would read
# the numbers one by one


@functools.partial(jax.jit, static_argnames="form")
def _part(form: Form, tensor: jax.Array) -> jax.Array:
    return form.part(tensor)


@functools.partial(jax.jit, static_argnames="form")
def _cut(form: Form, leaf: jax.Array, starts: Sequence[int]) -> jax.Array:
    return jax.lax.dynamic_slice(leaf, starts, form.shape)


@functools.partial(jax.jit, static_argnames="form")
def _tensor(form: Form, part: jax.Array) -> jax.Array:
    return form.tensor(part)


def entries(leaves: Leaves, names: Names, sites: Sites) -> dict[str, Entry]:
    """Return every name of a tree, and what of it the tensor is."""
    for path, leaf in leaves.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
            raise TypeError(
                f"the leaf {path!r} must be an array of numbers: got {checks.shown(leaf)}"
            )
    table = names.table({path: leaf.shape for path, leaf in leaves.items()})
    return {
        name: Entry.from_place(place, tuple(leaves[place.path].shape), sites)
        for name, place in table.items()
    }


def by_path(found: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """Return the entries of each leaf."""
    leaves: dict[str, dict[str, Entry]] = collections.defaultdict(dict)
    for name, entry in found.items():
        leaves[entry.place.path][name] = entry
    return leaves


def check_whole(path: str, leaf: Leaf, own: Mapping[str, Entry], what: str) -> None:
    """Raise if the parts of a leaf that have a tensor are not all of it."""
    held = sum(math.prod(entry.form.shape) for entry in own.values())
    if held != math.prod(leaf.shape):
        raise ValueError(
            f"every element of the leaf {path!r} of shape {tuple(leaf.shape)} must {what}: "
            f"got {held} of {math.prod(leaf.shape)}, from {sorted(own)[:5] or 'no name'}"
        )
