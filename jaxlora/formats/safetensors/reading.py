"""Read a checkpoint of Hugging Face into a tree."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.formats import arguments
from jaxlora.formats.names.mapping import Names, missing
from jaxlora.formats.safetensors import entries, shards
from jaxlora.formats.safetensors.entries import Entry
from jaxlora.formats.safetensors.shards import Checkpoint
from jaxlora.storage.locations import PathLike
from jaxlora.targets.sites import Sites, check_sites
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import paths, tree_checks
from jaxlora.weights.quantized import QuantizedWeight


def load(
    path: PathLike, names: Names, like: PyTree, *, sites: Sites, ignore: Sequence[str] = ()
) -> PyTree:
    """Return a tree with the weights of a checkpoint.

    One tensor is read at a time. Every tensor is used, and every element of the tree is read;
    anything else is an error.

    Args:
        path: a file of safetensors, an index ``model.safetensors.index.json``, or a folder with
            one of them.
        names: which tensors are which leaves. A name that does not end in ``.weight`` or ``.bias``
            is that of a module, whose weight it is; or in the layout ``"tensor"`` of the tensor.
        like: the tree, of arrays or `jax.ShapeDtypeStruct`, whose dtypes and shardings the leaves
            get.
        sites: where adapters can go in it, from `jaxlora.find_sites`, which tells how each weight
            lies.
        ignore: names of tensors that are not wanted, as regular expressions for whole names.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        TypeError: an argument is of the wrong kind.
        ValueError: a file is damaged; a tensor has no place, another shape than that needs, or a
            number that its leaf's dtype cannot hold; a part of a leaf has no tensor; a leaf of
            like is adapted, quantized, or of 64 bits without jax_enable_x64.
    """
    arguments.check_names(names)
    check_sites(sites)
    leaves, treedef = paths.flatten(like)
    tree_checks.check_leaves(leaves, like, "load(path, names, like)", "like")
    tree_checks.check_plain(leaves, "like of safetensors.load")
    unwanted = arguments.expressions(ignore)
    table = entries.entries(leaves, names, sites)
    _check_dtypes(leaves)

    def read(place: Path) -> list[jax.Array]:
        with shards.opened(place) as found:
            sources = entries.by_path(_sources(found, table, unwanted))
            for leaf_path, leaf in leaves.items():
                entries.check_whole(
                    leaf_path, leaf, sources[leaf_path], f"have a tensor in {found.where}"
                )
            return [_read(leaf, found, sources[leaf_path]) for leaf_path, leaf in leaves.items()]

    return treedef.unflatten(arguments.read(path, read, shards.INDEX))


def _check_dtypes(leaves: Leaves) -> None:
    """Raise if a leaf has a dtype that JAX has not now, or is quantized."""
    for path, leaf in leaves.items():
        if isinstance(leaf, QuantizedWeight):
            raise ValueError(
                f"the leaf {path!r} of like is quantized: load the weights plain, and give them to "
                "jaxlora.quantize"
            )
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ValueError(
                f"the leaf {path!r} of like is {leaf.dtype}, which needs jax_enable_x64"
            )


def _sources(
    found: Checkpoint, table: Mapping[str, Entry], unwanted: Sequence[re.Pattern[str]]
) -> dict[str, Entry]:
    """Return what each tensor is of the tree, or raise for one that has no place."""
    sources = {}
    for name, got in found.shapes.items():
        if arguments.is_among(name, unwanted):
            continue
        key = name if name in table else name.removesuffix(".weight")
        if (entry := table.get(key)) is None:
            raise ValueError(
                f"the tensor {name!r} of {found.where} has no place, and ignore does not name it: "
                f"{missing(key, table)}"
            )
        if got != (needed := entry.form.tensor_shape):
            raise ValueError(
                f"the tensor {name!r} of {found.where} must have the shape {needed} for "
                f"{str(entry.place)!r} in the layout {entry.place.layout!r}: got {got}"
            )
        sources[name] = entry
    return sources


def _cast(part: np.ndarray, leaf: Leaf, name: str, where: str) -> np.ndarray:
    """Return a part in the dtype of its leaf, or raise if that cannot hold what it says."""
    if part.dtype == leaf.dtype:
        return part
    kinds = (jnp.floating, jnp.integer, jnp.bool_, jnp.complexfloating)
    is_kind = any(jnp.issubdtype(part.dtype, k) and jnp.issubdtype(leaf.dtype, k) for k in kinds)
    with np.errstate(over="ignore"):
        made = part.astype(leaf.dtype)
    if not is_kind or _is_lost(made, part):
        raise ValueError(
            f"the tensor {name!r} of {where}, {part.dtype}, cannot be {leaf.dtype}, as its leaf is"
        )
    return made


def _is_lost(made: np.ndarray, part: np.ndarray) -> bool:
    """Tell whether a number became another than its nearest."""
    if jnp.issubdtype(part.dtype, jnp.integer):
        return bool((made.astype(part.dtype) != part).any() or ((made < 0) != (part < 0)).any())
    return bool((np.isfinite(part) & ~np.isfinite(made)).any())


def _read(leaf: Leaf, found: Checkpoint, sources: Mapping[str, Entry]) -> jax.Array:
    """Return a leaf, put where it is to be."""
    value = np.empty(leaf.shape, leaf.dtype)
    for name, entry in sources.items():
        value[entry.index] = _cast(entry.from_tensor(found[name]), leaf, name, found.where)
    if (sharding := getattr(leaf, "sharding", None)) is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
