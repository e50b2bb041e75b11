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
        return blocks.slices(self.place.part)

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """Return the part of the leaf."""
        if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:  # JAX would cast it
            return self.form.part(tensor)
        return np.asarray(_part(self.form, tensor))

    def to_tensor(self, leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Return the tensor of a leaf, which need not be ready; the opposite of `from_tensor`."""
        if not isinstance(leaf, jax.Array):
            return self.form.tensor(leaf[self.index])
        return _tensor(self.form, leaf, [start for start, _ in self.box])


# under `jax.jit`, which transposes faster than NumPy does


@functools.partial(jax.jit, static_argnames="form")
def _part(form: Form, tensor: jax.Array) -> jax.Array:
    return form.part(tensor)


@functools.partial(jax.jit, static_argnames="form")
def _tensor(form: Form, leaf: jax.Array, starts: Sequence[int]) -> jax.Array:
    return form.tensor(jax.lax.dynamic_slice(leaf, starts, form.shape))


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
