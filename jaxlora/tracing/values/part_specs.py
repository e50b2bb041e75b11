"""Where the arrays go that a deferred one is made of, such as codes and scales, on a mesh."""

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxlora.tracing.values import placement
from jaxlora.tracing.values.deferred import Deferred


def of_whole(base: Deferred, sharding: Sharding) -> Deferred | None:
    """Return where each part goes if the whole goes to a sharding.

    A part that an axis of the mesh cannot cut evenly, as scales of scales, is not cut by it.

    Returns:
        A `PartitionSpec` in the place of each part, or None where the first of them, the codes,
        cannot be cut as the whole.
    """
    if not isinstance(sharding, NamedSharding) or not base.is_aligned:
        return None
    entries = dict(zip(base.order, sharding.spec, strict=False))  # by axis

    def even(axis, size):
        entry = entries.get(axis)
        return None if size % placement.shards(sharding, entry) else entry

    found = jax.tree.map(
        lambda part: PartitionSpec(*(even(axis, n) for axis, n in enumerate(part.shape))), base
    )
    codes = jax.tree.leaves(found)[0]
    return found if all(codes[axis] == entry for axis, entry in entries.items()) else None


def of_shards(base: Deferred, sharding: NamedSharding) -> Deferred | None:
    """Return the same, or None where the shards of the parts do not make shards of the whole."""
    found = of_whole(base, sharding)
    if found is None:
        return None
    codes = jax.tree.leaves(found)[0]

    def is_cut_along(part, spec):
        return all(n == 1 or spec[axis] == codes[axis] for axis, n in enumerate(part.shape))

    return found if all(jax.tree.leaves(jax.tree.map(is_cut_along, base, found))) else None
