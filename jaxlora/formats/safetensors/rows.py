"""The rows of tensors as they are written, of an adapted weight each merged then."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.formats.safetensors.entries import Entry
from jaxlora.formats.streaming import Rows
from jaxlora.linalg import meshes
from jaxlora.messages import checks
from jaxlora.storage import processes
from jaxlora.trees import folding
from jaxlora.trees.merging import merge
from jaxlora.types import Leaf
from jaxlora.weights import memory, paths, placed, quantized
from jaxlora.weights.nodes import LoRAWeight
from jaxlora.weights.quantized import QuantizedWeight
from jaxlora.weights.sharding import explicit

_SWALLOWED = 0.01  # the share of changed elements below which merging has lost the product
_EVERY = 16  # of so many rows one is compared first


class Weight:
    """A leaf whose tensors are written.

    A weight on one device is merged some rows at a time, unless it is quantized, or scaled to a
    magnitude, which is of all of it.

    Args:
        path: its path, for errors.
        leaf: the leaf, plain or adapted.
    """

    def __init__(self, path: str, leaf: Leaf):
        self.path, self._leaf = path, leaf
        self._whole: jax.Array | np.ndarray | None = None
        self._size = self._left = math.prod(leaf.shape)  # elements, and those not merged yet
        self._moved = 0  # elements that merging has changed, of those that were compared

    def rows(self, entry: Entry) -> Iterator[Rows]:
        """Yield the rows of a tensor, see `streaming.write`."""
        rows = entry.rows(self._leaf.dtype.itemsize)
        if isinstance(self._leaf, LoRAWeight) and self._can_be_cut(self._leaf, rows[0]):
            for row in rows:
                yield functools.partial(row.laid, self._merged_part(self._leaf, row))
            return
        if self._whole is None:
            self._whole = merged(self.path, self._leaf)
        for row in rows:
            yield functools.partial(row.to_tensor, self._whole)

    def _can_be_cut(self, leaf: LoRAWeight, row: Entry) -> bool:
        sizes = enumerate(zip(row.form.shape, leaf.shape, strict=True))
        return folding.can_be_cut(leaf, [axis for axis, (size, whole) in sizes if size < whole])

    def _merged_part(self, leaf: LoRAWeight, row: Entry) -> Leaf:
        """Return some rows, merged; warn after the last if rounding has undone all."""
        plain = folding.fold_part(self.path, leaf, row.starts, row.form.shape)
        enough = _SWALLOWED * self._size
        if self._moved < enough:
            base = row.part_of(leaf.base)
            self._moved += int(_moved_of_few(base, plain))
        self._left -= plain.size
        if not self._left and self._moved < enough:
            _warn_of_rounding(self.path, leaf, folding.fold(self.path, leaf, 1))
        return plain


def merged(path: str, leaf: Leaf) -> jax.Array | np.ndarray:
    """Return all of a leaf, merged; gathered on the host if it is not all in this process."""
    if isinstance(leaf, QuantizedWeight):
        leaf = placed.plain(leaf)
    elif isinstance(leaf, LoRAWeight):
        plain = folding.fold(path, leaf, 1)
        _warn_of_rounding(path, leaf, plain)
        leaf = plain
    elif paths.is_node(leaf):
        leaf = merge({path: leaf})[path]
    is_here = isinstance(leaf, jax.Array) and jax.process_count() == 1
    return leaf if is_here and explicit(leaf) is None else processes.whole(leaf)


def _warn_of_rounding(path: str, leaf: LoRAWeight, merged: jax.Array) -> None:
    """Warn if rounding has undone what an adapter changes."""
    if int(meshes.run(_moved_of_few, (leaf.base, merged))) >= _SWALLOWED * merged.size:
        return  # as nearly always, and soon told
    meant, moved = (
        int(count) for count in jax.device_get(_counts(*memory.on_device((leaf, merged))))
    )
    if moved < _SWALLOWED * meant:
        checks.warn(
            f"merging changed {moved / meant:.2%} of the elements of {path!r} that its adapter is "
            f"for: {leaf.dtype} is too coarse for the product; save it in float32",
            UserWarning,
        )


@jax.jit
def _moved_of_few(base: Leaf, merged: jax.Array) -> jax.Array:
    """Return how many elements of some rows are not as in the base."""
    return jnp.count_nonzero(merged[::_EVERY] != quantized.values(base)[::_EVERY])


@jax.jit
def _counts(leaf: LoRAWeight, merged: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return how many elements an adapter is to change, and how many of these it has."""
    is_meant = leaf.delta() != 0
    is_moved = is_meant & (merged != quantized.values(leaf.base))
    return jnp.count_nonzero(is_meant), jnp.count_nonzero(is_moved)
