"""Write a tree as a checkpoint of Hugging Face."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlora.formats import arguments
from jaxlora.formats.names.mapping import Names, module_and_tensor
from jaxlora.formats.safetensors import entries, shards
from jaxlora.formats.safetensors.entries import Entry
from jaxlora.formats.safetensors.rows import Weight, merged
from jaxlora.formats.streaming import Rows
from jaxlora.messages import checks
from jaxlora.storage import replacing
from jaxlora.storage.locations import PathLike
from jaxlora.storage.processes import together
from jaxlora.targets.sites import Sites, check_sites
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import paths, tree_checks


def save(
    path: PathLike, params: PyTree, names: Names, *, sites: Sites, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write the weights of a tree as a checkpoint of Hugging Face.

    Adapted weights are merged, some rows at a time, in float32 and rounded once, as `jaxlora.merge`
    does; one that is quantized, has a magnitude or is on several devices is merged at once.
    Quantized weights are dequantized. The folder is there whole, or what was there before is as it
    was.

    Args:
        path: a folder that is not there, is empty, or holds nothing but an earlier save.
        params: a tree of weights, plain or adapted; arrays that are spread over devices or
            processes are gathered. Every process calls it.
        names: which tensors are which leaves, see `load`; every leaf has a name.
        sites: where adapters can go in the tree, from `jaxlora.find_sites`.
        max_shard_bytes: bytes of one file; where there are more, there are several and an index.

    Raises:
        FileExistsError: the folder holds something else.
        TypeError: an argument is of the wrong kind, or params is traced by JAX.
        ValueError: a part of a leaf has no name, or a merged weight is not finite.
        OSError: it cannot be written.

    Warns:
        UserWarning: merging an adapter that is not zero changed next to nothing of its weight,
            because the dtype of that is too coarse for the product.
    """
    arguments.check_names(names)
    check_sites(sites)
    most = checks.check_count(max_shard_bytes, "max_shard_bytes")
    leaves, _ = paths.flatten(params)
    plain = {leaf_path: paths.plain(leaf) for leaf_path, leaf in leaves.items()}
    tree_checks.check_leaves(plain, params, "save(path, params, names)")
    tree_checks.check_untraced("safetensors.save", params)
    for leaf_path, leaf in plain.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"the leaf {leaf_path!r} must be an array: got a shape")
    found = _targets(plain, names, sites)
    dtypes = {leaf_path: _dtype(leaf) for leaf_path, leaf in leaves.items()}
    shapes = {
        name: jax.ShapeDtypeStruct(entry.form.tensor_shape, dtypes[entry.place.path])
        for name, entry in found.items()
    }
    target = arguments.local(path)
    weights = _Weights(leaves)

    def write(folder: Path) -> None:
        def first() -> None:
            folder.mkdir()
            shards.write(folder, shapes, lambda name: weights.rows(found[name]), most)

        weights.gather()
        together("safetensors.save", lambda: replacing.with_path(target, first), first_alone=True)

    replacing.replace(
        "safetensors.save",
        target,
        write,
        lambda place: replacing.check_free(place, target, shards.is_of_checkpoint),
    )


def _dtype(leaf: Leaf) -> np.dtype:
    """Return the dtype that a leaf is written in: what JAX merges has one of JAX."""
    return jax.dtypes.canonicalize_dtype(leaf.dtype) if paths.is_node(leaf) else leaf.dtype


class _Weights:
    """The weights of a tree, merged when their tensors are written."""

    def __init__(self, leaves: Leaves):
        self._leaves = leaves
        self._last: Weight | None = None

    def gather(self) -> None:
        """Merge and gather all of them, where several processes have to do that together."""
        if jax.process_count() > 1:
            self._leaves = {path: merged(path, leaf) for path, leaf in self._leaves.items()}

    def rows(self, entry: Entry) -> Iterator[Rows]:
        """Return the rows of a tensor, see `streaming.write`."""
        path = entry.place.path
        if self._last is None or self._last.path != path:
            self._last = Weight(path, self._leaves[path])
        return self._last.rows(entry)


def _targets(leaves: Leaves, names: Names, sites: Sites) -> dict[str, Entry]:
    """Return what each tensor is, by its name in the file."""
    found: dict[str, Entry] = {}
    by_path = entries.by_path(entries.entries(leaves, names, sites))
    for path, leaf in leaves.items():
        entries.check_whole(path, leaf, by_path[path], "have a name")
        for name, entry in by_path[path].items():
            is_alone = entry.count > 1 or entry.place.layout == "tensor"
            is_module = not is_alone and module_and_tensor(name)[0] == name
            tensor = f"{name}.weight" if is_module else name
            if found.setdefault(tensor, entry) is not entry:
                raise ValueError(
                    f"two places have the tensor {tensor!r}: {found[tensor].place}, {entry.place}"
                )
    return found
