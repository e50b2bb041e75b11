"""Orbax checkpoints in directories: each is there whole, or what was there before is.

Orbax is imported where it is used, because that takes half as long as importing JAX.
"""

import contextlib
import fnmatch
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath

from jaxlora.storage import locations, replacing
from jaxlora.storage.locations import PathLike, Place
from jaxlora.storage.processes import together
from jaxlora.types import Json, Leaf, Leaves, PyTree
from jaxlora.weights import sharding

ADAPTERS, MERGED = "jaxlora.adapters", "jaxlora.merged"  # formats
MARK = "_CHECKPOINT_METADATA"
NOT_WRITTEN = "what was written is not what was to be saved"
_NAMES = MappingProxyType({ADAPTERS: "adapters", MERGED: "merged weights"})
T = TypeVar("T")


def write(
    call: str, path: PathLike, tree: PyTree, about: Json, check: Callable[[Place], None]
) -> None:
    """Write a checkpoint beside its destination, check it, and put it in its place."""
    target = together(call, lambda: locations.resolve(path))

    def save(place: Place) -> None:
        def said(action: Callable[[], object]) -> None:
            replacing.with_path(target, action)

        together(call, lambda: said(lambda: _save(place, tree, about)))
        together(call, lambda: said(lambda: _check_about(place, about)), first_alone=True)
        said(lambda: check(place))

    if not locations.is_local(target):
        together(call, lambda: _check_is_free(target), first_alone=True)
        return save(target)
    replacing.replace(
        call, target, save, lambda place: _check_replaceable(place, target, about["format"])
    )


def _check_about(place: Place, about: Json) -> None:
    """Raise if a checkpoint does not say of itself what it was to say."""
    if about_of(place, place) != about:
        raise ValueError(NOT_WRITTEN)


def _check_is_free(target: Place) -> None:
    if target.exists():
        raise FileExistsError(
            f"{target} exists, and in a bucket nothing can be replaced without deleting it first: "
            "a path of its own is needed for each save"
        )


def _check_replaceable(place: Place, target: Place, kind: str) -> None:
    """Raise if there is something that is no earlier save of a kind, and no empty directory."""
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        found = json.loads((place / MARK).read_bytes())["custom_metadata"]["format"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != kind:
        what = "something that is no checkpoint"
        if (place / MARK).is_file():
            what = _NAMES.get(str(found), "a checkpoint of something else")
        raise FileExistsError(
            f"{target} holds {what}: only {_NAMES[kind]} that were saved there before are "
            "replaced; choose another path"
        )


def _save(place: Place, tree: PyTree, about: Json) -> None:
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer, _literal(place) as path:
        args = ocp.args.StandardSave(jax.tree.map(_savable, tree))
        checkpointer.save(path, args=args, custom_metadata=about)


@contextlib.contextmanager
def _literal(place: Place) -> Iterator[Place]:
    """Yield a path that leads to the same place and is no pattern of other names.

    Orbax takes the path for a pattern when it collects what it wrote, and ``run[0]`` for ``run0``.
    """
    if all(fnmatch.fnmatchcase(part, part) for part in place.parts):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "workspace")
        link.symlink_to(place.parent, target_is_directory=True)
        yield link / place.name


def _savable(array: Leaf) -> Leaf:
    """Return an array as Orbax takes it: one that each process has for itself as NumPy's."""
    is_local = isinstance(array, jax.Array) and array.is_fully_addressable
    return np.asarray(array) if is_local and jax.process_count() > 1 else array


def like(array: Leaf) -> jax.ShapeDtypeStruct:
    """Return the shape of an array, to be read to where it is."""
    is_spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    place = array.sharding if is_spread else sharding.default()
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def about_of(place: Place, target: Place) -> Json:
    """Return what a save wrote of itself, or raise if there is none."""
    if not place.exists():
        raise FileNotFoundError(f"no adapters at {target}: there is no such directory")
    if not (place / MARK).is_file():
        raise ValueError(f"no adapters at {target}: it is no Orbax checkpoint, or not a whole one")
    try:
        about = json.loads((place / MARK).read_bytes())["custom_metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint at {target} is damaged: {MARK} is no JSON") from error
    return about if isinstance(about, dict) else {}


def read(place: Place, like: dict[str, Leaves]) -> dict[str, dict[str, jax.Array]]:
    """Return the arrays of a checkpoint.

    Args:
        place: where it is.
        like: shapes and shardings by path and name.
    """
    if locations.is_local(place) and jax.process_count() == 1 and (found := stores(place)):
        return _read_alone(found, like)
    return restored(place, like)


def stores(place: Place) -> dict[str, Leaves]:
    """Return how TensorStore opens each array of a checkpoint, by the name that Orbax gives it."""
    import tensorstore as ts

    if not (place / "manifest.ocdbt").exists():
        return {}
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place}/"}}
    keys = [key.decode() for key in ts.KvStore.open(database).result().list().result()]
    names = [key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray")]
    return {n: {"driver": "zarr", "kvstore": {**database, "path": f"{n}/"}} for n in names}


def _read_alone(found: dict[str, Leaves], like: dict[str, Leaves]) -> PyTree:
    """Return arrays as they are stored, without Orbax.

    When one cannot be read, because it is damaged or just replaced, threads of Orbax that read
    the others print errors that nobody can catch.
    """
    import tensorstore as ts

    wanted = {f"{path}.{name}" for path in like for name in like[path]}
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"the arrays {missing} are missing")
    opening = {
        path: {name: ts.open(found[f"{path}.{name}"], read=True) for name in like[path]}
        for path in like
    }
    reading = jax.tree.map(lambda opened: opened.result().read(), opening)

    def placed(pending, shape):
        array = pending.result()
        if (array.shape, array.dtype) != (shape.shape, shape.dtype):
            raise ValueError(
                f"an array must be {shape.dtype}{list(shape.shape)}: "
                f"got {array.dtype}{list(array.shape)}"
            )
        return jax.device_put(array, shape.sharding)

    return jax.tree.map(placed, reading, like)


def restored(place: Place, like: PyTree) -> PyTree:
    """Return arrays read by Orbax, each process for itself, so that none waits for another."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(place, args=ocp.args.StandardRestore(like))


def structure(place: Place) -> PyTree:
    """Return what Orbax tells of each leaf of a checkpoint, in the place of the leaf."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(place).item_metadata.tree


def shapes(place: Place) -> dict[KeyPath, object]:
    """Return the shape and dtype of each array of a checkpoint, by the keys that lead to it."""
    import orbax.checkpoint as ocp

    found = ocp.tree.to_flat_dict(structure(place))
    return {keys: (tuple(x.shape), str(x.dtype)) for keys, x in found.items()}


def shapes_of(tree: PyTree) -> dict[KeyPath, object]:
    """Return what `shapes` does of a tree to be saved; None for a leaf that is no plain array."""
    import orbax.checkpoint as ocp

    def shape(x):
        is_array = isinstance(x, jax.Array | np.ndarray)
        if not is_array or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return None
        return tuple(x.shape), str(x.dtype)

    return {keys: shape(x) for keys, x in ocp.tree.to_flat_dict(tree).items()}
