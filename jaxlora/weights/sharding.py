"""Where arrays are: each takes the sharding of the axes of a weight that it carries.

A base sharded over a mesh has a spec for each axis. ``a`` takes those of its stack and in axes,
``b`` those of its stack and out axes, and the rank is not sharded. So the products of a layer
need no more of a mesh than the layer itself, and no device holds a factor of a part of the base
that it does not hold.

What is known of a base's sharding depends on where it is met. An array, or the shape of one,
tells its sharding. Inside of `jax.jit` an array on an Explicit mesh has its spec in its type. On
an Auto mesh there it tells nothing: the compiler decides.
"""

import math

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.types import Leaf, PyTree
from jaxlora.weights.quantized import stand_in

Axes = tuple[int | None, ...]


def concrete(array: Leaf) -> NamedSharding | None:
    """Return the sharding of a concrete array or of the shape of one, None where it has none.

    A quantized weight is where its codes are, also for the functions below.
    """
    array = stand_in(array)
    found = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    known = isinstance(found, NamedSharding) and isinstance(found.mesh, Mesh)
    return found if known else None


def explicit(array: Leaf) -> NamedSharding | None:
    """Return the sharding in the type of an array on an Explicit mesh, else None."""
    array = stand_in(array)
    if not isinstance(array, jax.Array):
        return None
    found = jax.typeof(array).sharding
    return found if found.mesh.explicit_axes else None


def along(sharding: NamedSharding, axes: Axes) -> NamedSharding:
    """Return the sharding of an array that has these axes of another.

    Args:
        sharding: of the other array.
        axes: for each dimension its axis of the other array; None is not sharded.

    >>> import jax, numpy as np
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
    >>> mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    >>> specs = along(NamedSharding(mesh, PartitionSpec("data", "model")), (1, None)).spec
    >>> tuple(specs)
    ('model', None)
    """
    spec = dict(enumerate(sharding.spec))
    parts = [None if axis is None else spec.get(axis) for axis in axes]
    return NamedSharding(sharding.mesh, PartitionSpec(*parts))


def shards(sharding: NamedSharding, entry: object) -> int:
    """Return over how many parts an entry of a spec divides its dimension."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return 1
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def even_axes(base: Leaf, shapes: PyTree) -> PyTree:
    """Return for each array of a tree its axes along which it can be cut as a base is.

    Args:
        base: the weight, an array.
        shapes: the tree, of arrays or shapes that have the axes of the base, in other sizes.
    """
    known = explicit(base) or concrete(base)

    def axes(array):
        spec = dict(enumerate(known.spec if known else ()))
        counts = [shards(known, spec[i]) if i in spec and known else 1 for i in range(array.ndim)]
        return tuple(None if array.shape[i] % count else i for i, count in enumerate(counts))

    return jax.tree.map(axes, shapes)


def default() -> jax.sharding.Sharding:
    """Return where arrays go that nothing places: the mesh in use, or else one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, PartitionSpec())


def replicated(array: Leaf) -> NamedSharding | None:
    """Return the sharding that puts a small result from an array on all of its devices."""
    found = concrete(array)
    return None if found is None else NamedSharding(found.mesh, PartitionSpec())
