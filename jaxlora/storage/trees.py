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
from jaxlora.storage.locations import PathLike, Place
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
    place = check_is_tree(path)
    try:
        found = _read(place)
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise ValueError(f"the weights at {target} are damaged: {error}") from error
    return _boxed(found) if _is_boxed(found) else found


def check_is_tree(path: PathLike) -> Place:
    """Return where a checkpoint of Orbax stands, or raise where there is none."""
    target = locations.resolve(path)
    place = directories.standing(target) if locations.is_local(target) else target
    if not place.exists():
        raise FileNotFoundError(f"no weights at {target}: there is no such directory")
    if not (place / _STRUCTURE).is_file():
        raise ValueError(f"no weights at {target}: it is no tree that Orbax saved")
    return place


def _read(place: Place) -> PyTree:
    """Return the tree of a checkpoint.

    Arrays are opened before Orbax is asked for the structure, and read without it: of damaged ones
    its threads print errors that nobody can catch.
    """
    import tensorstore as ts

    stores = checkpoints.stores(place) if locations.is_local(place) else {}
    opening = {name: ts.open(store, read=True) for name, store in stores.items()}
    opened = {name: found.result() for name, found in opening.items()}
    told = checkpoints.structure(place)
    if {leaf.name for leaf in jax.tree.leaves(told)} - {*opened}:
        return checkpoints.restored(place, jax.tree.map(_like, told))
    # one after the other, so that no more than one is in memory twice
    return jax.tree.map(lambda leaf: _made(leaf, opened[leaf.name].read().result()), told)


def _is_scalar(leaf: Any) -> bool:
    """Tell whether Orbax says of a leaf that it was a number of Python."""
    return type(leaf).__name__ == "ScalarMetadata"


def _is_of_jax(leaf: Any) -> bool:
    """Tell whether JAX can have the dtype of a leaf; others stay as NumPy has them."""
    return jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype


def _made(leaf: Any, array: np.ndarray) -> Leaf:
    """Return what was saved as an array, of which Orbax tells."""
    if _is_scalar(leaf):
        return array.item()
    return jax.device_put(array, sharding.default()) if _is_of_jax(leaf) else array


def _like(leaf: Any) -> Any:
    """Return what Orbax is to restore for what it tells of a leaf."""
    dtype = np.dtype(leaf.dtype)
    if _is_scalar(leaf):
        return dtype.type(0).item()
    place = sharding.default() if _is_of_jax(leaf) else None
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)


def _is_box(tree: PyTree) -> bool:
    return isinstance(tree, Mapping) and [*tree] == ["value"] and not _is_inner(tree["value"])


def _is_inner(tree: PyTree) -> bool:
    return isinstance(tree, Mapping | list | tuple)


def _is_boxed(tree: PyTree) -> bool:
    """Tell whether every leaf of a tree is alone under the key ``value``."""
    return all(map(_is_box, jax.tree.leaves(tree, is_leaf=_is_box)))


def _boxed(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda box: Box(box["value"]), tree, is_leaf=_is_box)
