"""Where the arrays of a planned step are: shapes with shardings, on one device or on a mesh.

Weights are where the user says. Factors take the shardings of the axes of their weights, arrays of
the optimizer that mirror what is trained take its, and all else is on every device.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.messages.checks import shown
from jaxlora.tracing.program import is_array
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import blocks, paths, sharding
from jaxlora.weights.adapters import Adapters
from jaxlora.weights.quantized import QuantizedWeight


def abstract(tree: PyTree) -> PyTree:
    """Return a tree with the shape, dtype and sharding on a mesh of each array in its place."""
    return jax.tree.map(lambda leaf: _abstract(leaf) if is_array(leaf) else leaf, tree)


def _abstract(leaf: Leaf) -> jax.ShapeDtypeStruct:
    dtype = jax.typeof(leaf).dtype if isinstance(leaf, np.ndarray) else leaf.dtype
    weak = bool(getattr(leaf, "weak_type", False))
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding.concrete(leaf), weak_type=weak)


def mesh_of(mesh: Mesh | None, **trees: PyTree) -> Mesh | None:
    """Return the one mesh that is given and that arrays and shardings are on, None for none.

    Args:
        mesh: what the user gave.
        **trees: trees of abstract arrays or of shardings, by name.

    Raises:
        ValueError: there are two.
    """
    found, first = mesh, "mesh"
    for name, tree in trees.items():
        for path, other in _meshes(tree):
            where = f"{path!r} in {name}" if path else name
            if found is not None and other != found:
                raise ValueError(
                    f"all must be on one mesh: {first} is on {_brief(found)}, {where} on "
                    f"{_brief(other)}"
                )
            if found is None:
                found, first = other, where
    return found


def _meshes(tree: PyTree) -> Iterator[tuple[str, Mesh]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_entry)
    for path, (_, leaf) in zip(paths.names([keys for keys, _ in flat]), flat, strict=True):
        known = leaf if isinstance(leaf, NamedSharding) else sharding.concrete(leaf)
        if known is not None and isinstance(known.mesh, Mesh):
            yield path, known.mesh


def _brief(mesh: Mesh) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    kinds = ", ".join(str(kind) for kind in mesh.axis_types)
    return f"({axes}) of {kinds} from device {mesh.devices.flat[0].id}"


def _is_entry(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, NamedSharding | PartitionSpec)


def placed(params: PyTree, mesh: Mesh | None, shardings: PyTree) -> PyTree:
    """Return abstract weights with their shardings.

    Args:
        params: abstract weights, perhaps with shardings of their own, which a tree of shardings
            replaces.
        mesh: where all is, None for one device.
        shardings: None, or a tree like params.

    Raises:
        ValueError: a leaf has no entry or an entry no leaf, there is no mesh for a spec, or an
            entry does not fit the shape of its leaf.
        TypeError: an entry is no sharding.
    """
    leaves, treedef = paths.flatten(params)
    if shardings is None:
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        known = {path: sharding.concrete(leaf) or everywhere for path, leaf in leaves.items()}
    else:
        known = _entries(leaves, mesh, shardings)
    made = {path: _with_sharding(leaf, known[path]) for path, leaf in leaves.items()}
    return treedef.unflatten(made.values())


def _entries(
    leaves: Leaves, mesh: Mesh | None, shardings: PyTree
) -> dict[str, NamedSharding | None]:
    """Return the sharding of each leaf from a tree of entries."""
    flat, _ = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=_is_entry)
    names = paths.names([keys for keys, _ in flat])
    entries = {path: entry for path, (_, entry) in zip(names, flat, strict=True)}
    if missing := [path for path in leaves if path not in entries]:
        raise ValueError(
            f"shardings must be a tree like params: it has nothing for {missing[0]!r}; "
            f"{paths.nearest(missing[0], entries)}"
        )
    if extra := [path for path in entries if path not in leaves]:
        raise ValueError(
            f"shardings must be a tree like params: it has {extra[0]!r}, which is no leaf; "
            f"{paths.nearest(extra[0], leaves)}"
        )
    return {path: _entry(path, leaves[path], entries[path], mesh) for path in leaves}


def _entry(path: str, leaf: Leaf, entry: object, mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding that an entry means for a leaf."""
    if not isinstance(entry, NamedSharding | PartitionSpec | None):
        raise TypeError(
            f"shardings must hold NamedSharding, PartitionSpec or None: got {shown(entry)} for "
            f"{path!r}"
        )
    if mesh is None and isinstance(entry, PartitionSpec):
        raise ValueError(
            f"shardings has a PartitionSpec for {path!r}, which says nothing without a mesh: "
            "pass mesh as well"
        )
    if mesh is None or not hasattr(leaf, "shape"):
        return None
    spec = entry.spec if isinstance(entry, NamedSharding) else entry or PartitionSpec()
    try:
        known = NamedSharding(mesh, spec)
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=known)  # refuses too long a spec
        known.shard_shape(tuple(leaf.shape))
    except ValueError as error:
        raise ValueError(
            f"the sharding {spec} of {path!r} does not fit its shape {tuple(leaf.shape)} on "
            f"{_brief(mesh)}: {str(error).splitlines()[0]}"
        ) from error
    return known


def _with_sharding(leaf: Leaf, known: NamedSharding | None) -> Leaf:
    """Return an abstract weight that is sharded so, its arrays where it is quantized."""
    if isinstance(leaf, QuantizedWeight):
        if known is None:
            return leaf
        whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=known)
        axes = sharding.even_axes(whole, leaf)
        return jax.tree.map(
            lambda x, kept: _with_sharding(x, sharding.along(known, kept)), leaf, axes
        )
    return leaf.update(sharding=known) if is_array(leaf) else leaf


def of_quantized(base: PyTree, params: PyTree) -> PyTree:
    """Return abstract weights, some of them quantized, sharded as those that they were made of."""
    leaves, treedef = paths.flatten(base)
    known = {path: sharding.concrete(leaf) for path, leaf in paths.flatten(params)[0].items()}
    made = [
        _with_sharding(leaf, known[path]) if isinstance(leaf, QuantizedWeight) else leaf
        for path, leaf in leaves.items()
    ]
    return treedef.unflatten(made)


def of_factors(adapters: Adapters, params: PyTree, mesh: Mesh | None) -> Adapters:
    """Return abstract adapters, each array sharded as the axes of its weight that it carries."""
    leaves, _ = paths.flatten(params)

    def arrays(name):
        adapter = adapters[name]
        known = sharding.concrete(leaves[blocks.locate(name, leaves)[0]])
        if known is None and mesh is not None:
            known = NamedSharding(mesh, PartitionSpec())
        for field, array in adapter.trained().items():
            kept = known and sharding.along(known, adapter.axes()[field])
            yield field, array.update(sharding=kept)

    return {
        name: dataclasses.replace(adapter, **dict(arrays(name)))
        for name, adapter in adapters.items()
    }


def of_state(state: PyTree, trained: PyTree, mesh: Mesh | None) -> PyTree:
    """Return the abstract state of an optimizer; what mirrors the trained is sharded as that.

    An array mirrors one that is trained if its keys end in the keys of that, as those of the means
    of Adam do, and its shape is the same.
    """
    if mesh is None:
        return state
    everywhere = NamedSharding(mesh, PartitionSpec())
    flat, _ = jax.tree_util.tree_flatten_with_path(trained)
    known = {(tuple(keys), leaf.shape): leaf.sharding for keys, leaf in flat}

    def put(keys, leaf):
        ends = ((tuple(keys[i:]), leaf.shape) for i in range(len(keys) + 1))
        found = next((known[end] for end in ends if end in known), everywhere)
        return leaf.update(sharding=found)

    return jax.tree_util.tree_map_with_path(put, state)


Shardings = Sequence[jax.sharding.Sharding | None]


def nbytes(arrays: Sequence[Leaf], shardings: Shardings) -> int:
    """Return the bytes that each device holds of some abstract arrays.

    Args:
        arrays: the arrays.
        shardings: for each that of a compiled program, None for what the program does not read.
    """
    pairs = zip(arrays, shardings, strict=True)
    return sum(_nbytes(array, known or array.sharding) for array, known in pairs)


def _nbytes(array: Leaf, known: jax.sharding.Sharding | None) -> int:
    shape = array.shape if known is None else known.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def parts(shardings: Iterable[jax.sharding.Sharding | None]) -> int:
    """Return over how many devices work is shared: along each mesh axis that cuts an array."""
    sizes: dict[str, int] = {}
    for known in shardings:
        if isinstance(known, NamedSharding):
            entries = [e if isinstance(e, tuple) else (e,) for e in known.spec]
            names = [name for entry in entries for name in entry if isinstance(name, str)]
            sizes |= {name: known.mesh.shape[name] for name in names}
    return math.prod(sizes.values())
