"""Trees of weights in checkpoints of Orbax, read as they are, without the program they are for.

Orbax gives back dicts and lists, whatever the tree was made of. What was an attribute ``value`` of
Flax NNX comes back as a dict with that one key, and is a `Box` here, so that the paths of leaves
are those of the tree that was saved.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxlora.storage import checkpoints, directories, locations
from jaxlora.storage.locations import PathLike
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import sharding

_STRUCTURE = "_METADATA"  # the file in which Orbax has the structure of a tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """What holds a leaf as an attribute ``value``, which is no part of the leaf's path."""

    value: Leaf


def read(path: PathLike) -> PyTree:
    """Return the tree of a checkpoint, its arrays on the default device.

    Args:
        path: a directory that `jaxlora.save_merged` or Orbax wrote, or a path as that takes it.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no tree, or a damaged one.
    """
    target = locations.resolve(path)
    place = directories.standing(target) if locations.is_local(target) else target
    if not place.exists():
        raise FileNotFoundError(f"no weights at {target}: there is no such directory")
    if not (place / _STRUCTURE).is_file():
        raise ValueError(f"no weights at {target}: it is no tree that Orbax saved")
    try:
        found = checkpoints.restored(place, jax.tree.map(_like, checkpoints.structure(place)))
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise ValueError(f"the weights at {target} are damaged: {error}") from error
    return _boxed(found) if _is_boxed(found) else found


def _like(found: Any) -> Any:
    """Return what Orbax is to restore for what it tells of a leaf."""
    dtype = np.dtype(found.dtype)
    if type(found).__name__ == "ScalarMetadata":
        return dtype.type(0).item()
    is_of_jax = jax.dtypes.canonicalize_dtype(dtype) == dtype  # others stay as NumPy has them
    place = sharding.default() if is_of_jax else None
    return jax.ShapeDtypeStruct(found.shape, dtype, sharding=place)


def _is_box(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and [*tree] == ["value"] and not _is_inner(tree["value"])


def _is_inner(tree: PyTree) -> bool:
    return isinstance(tree, Mapping | list | tuple)


def _is_boxed(tree: PyTree) -> bool:
    """Tell whether every leaf of a tree is alone under the key ``value``."""
    return all(map(_is_box, jax.tree.leaves(tree, is_leaf=_is_box)))


def _boxed(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda box: Box(box["value"]), tree, is_leaf=_is_box)
