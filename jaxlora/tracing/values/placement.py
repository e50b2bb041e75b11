"""Where the factors of a weight live on a mesh: each axis where the base has it, rank unsharded.

On a mesh with Explicit axes the sharding of an array is in its type, and operations that could
go several ways have to be told which.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.tracing.values import axes
from jaxlora.weights.sharding import explicit, shards


def spec_of(
    dims: axes.Dims, sharding: NamedSharding, carried: Callable[[Any], bool]
) -> PartitionSpec | None:
    """Return where a factor goes for a weight of these dimensions on a mesh.

    Args:
        dims: the pieces of the weight's dimensions.
        sharding: the weight's.
        carried: whether the factor carries a piece of a label.

    Returns:
        One entry for each carried piece and one for the rank, or None where a dimension is cut
        within its first piece.
    """
    entries = [*sharding.spec, *[None] * (len(dims) - len(sharding.spec))]
    spec = []
    for dim, entry in zip(dims, entries, strict=True):
        if dim and dim[0][1] % shards(sharding, entry):
            return None
        for label, _ in dim:
            if carried(label):
                spec.append(entry)
            entry = None
    return PartitionSpec(*spec, None)


def typed(x: Any) -> Any:
    """Return the sharding in the type of an array; what is deferred has none."""
    return jax.typeof(
        x if isinstance(x, jax.Array) else jax.ShapeDtypeStruct(x.shape, x.dtype)
    ).sharding


def reshape(x: Any, sizes: Sequence[Sequence[int]]) -> Any:
    """Split each dimension into sizes; a sharded dimension stays so along its first part."""
    flat = [size for group in sizes for size in group]
    if tuple(flat) == tuple(x.shape):
        return x
    if (sharding := explicit(x)) is None:
        return x.reshape(flat)
    spec = []
    for group, entry in zip(sizes, sharding.spec, strict=True):
        spec += [entry, *[None] * (len(group) - 1)][: len(group)]
    return lax.reshape(x, flat, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def repeated(x: Any, kept: Sequence[int], sizes: Sequence[int]) -> Any:
    """Return x, which has the kept ones of some axes, repeated along the others."""
    if len(kept) == len(sizes):
        return x
    if (sharding := explicit(x)) is None:
        return lax.broadcast_in_dim(x, sizes, kept)
    spec = [None] * len(sizes)
    for axis, entry in zip(kept, sharding.spec, strict=True):
        spec[axis] = entry
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return lax.broadcast_in_dim(x, sizes, kept, out_sharding=sharding)


def like(x: Any, y: Any) -> Any:
    """Return x in the shape of y, and where y is."""
    if (sharding := explicit(y)) is None:
        return x if x.shape == y.shape else x.reshape(y.shape)
    if x.shape != y.shape:
        x = lax.reshape(x, y.shape, out_sharding=sharding)
    return x if explicit(x) == sharding else jax.sharding.reshard(x, sharding)


def beside(x: Any, y: Any) -> Any:
    """Return x, whose dimensions are those of y or of size 1, placed so that it can meet y."""
    if (sharding := explicit(y)) is None:
        return x
    spec = [None if n == 1 else entry for n, entry in zip(x.shape, sharding.spec, strict=True)]
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def product_sharding(named: Sequence[tuple[Any, Sequence[Any]]], out: Sequence[Any]) -> Any:
    """Return where the product of named arrays goes: each axis where it is in one of them.

    Args:
        named: arrays and the names of their axes.
        out: names of the axes of the product.

    Returns:
        The sharding, or None where no array is on a mesh with Explicit axes.
    """
    found = [(explicit(x), names) for x, names in named]
    meshes = [sharding.mesh for sharding, _ in found if sharding is not None]
    if not meshes:
        return None
    entries: dict[Any, Any] = {}
    for sharding, names in found:
        if sharding is not None:
            for name, entry in zip(names, sharding.spec, strict=True):
                entries[name] = entries.get(name) or entry
    spec, used = [], set()
    for name in out:
        entry = entries.get(name)
        mesh_axes = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        spec.append(None if used & mesh_axes else entry)
        used |= mesh_axes
    return NamedSharding(meshes[0], PartitionSpec(*spec))
