"""Where the factors live: each takes the sharding of the base's axes that it carries.

A base sharded over a mesh has a spec for each axis. ``a`` takes those of its stack and in axes,
``b`` those of its stack and out axes, and the rank is not sharded. So the products of a layer
need no more of a mesh than the layer itself, and no device holds a factor of a part of the base
that it does not hold.

What is known of a base's sharding depends on where it is met. An array, or the shape of one,
tells its sharding. Inside of `jax.jit` an array on an Explicit mesh has its spec in its type. On
an Auto mesh there it tells nothing, the compiler decides; so there a factor is made to look, to
the compiler alone, as if it were computed from the base, and its sharding follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlora.weights.quantized import stand_in

if TYPE_CHECKING:
    from jaxlora.weights.blocks import Part
    from jaxlora.weights.nodes import Roles

Axes = tuple[int | None, ...]


def of(array: Any) -> NamedSharding | None:
    """Return the sharding of a concrete array or of the shape of one, None where it has none.

    A quantized weight is where its codes are, also for the functions below.
    """
    array = stand_in(array)
    found = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    known = isinstance(found, NamedSharding) and isinstance(found.mesh, Mesh)
    return found if known else None


def explicit(array: Any) -> NamedSharding | None:
    """Return the sharding in the type of an array on an Explicit mesh, else None."""
    array = stand_in(array)
    if not isinstance(array, jax.Array):
        return None
    found = jax.typeof(array).sharding
    return found if found.mesh.explicit_axes else None


def factor_axes(roles: Roles, part: Part | None = None) -> tuple[Axes, Axes, Axes]:
    """Return for each dimension of ``a``, of ``b`` and of a magnitude its axis of the base.

    Args:
        roles: roles of the base's axes.
        part: the part of the base that the factors are for.

    Returns:
        Axes; None for the rank, and for an axis of which the factors have a part.
    """
    cut = {axis for axis, bounds in enumerate(part or ()) if bounds}

    def whole(*axes):
        return tuple(None if axis in cut else axis for axis in axes)

    b = whole(*roles.stack, None, *roles.out)
    return whole(*roles.stack, *roles.in_, None), b, whole(*roles.stack, *roles.out)


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


def shards(sharding: NamedSharding, entry: Any) -> int:
    """Return over how many parts an entry of a spec divides its dimension."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return 1
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def even_axes(base: Any, shapes: Any) -> Any:
    """Return for each array of a tree its axes along which it can be cut as a base is.

    Args:
        base: the weight, an array.
        shapes: the tree, of arrays or shapes that have the axes of the base, in other sizes.
    """
    known = explicit(base) or of(base)

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


def replicated(array: Any) -> NamedSharding | None:
    """Return the sharding that puts a small result from an array on all of its devices."""
    found = of(array)
    return None if found is None else NamedSharding(found.mesh, PartitionSpec())


def make(
    build: Callable[..., Sequence[jax.Array]],
    static: Hashable,
    key: jax.Array,
    base: Any,
    axes: Sequence[Axes],
) -> Sequence[jax.Array]:
    """Return the arrays of ``build(key, static)``, sharded as the base's axes that they have.

    Where the sharding of the base is known, every device draws its own part alone; the values
    are the same however they are sharded, for keys of JAX's default implementation.

    Args:
        build: a pure function at the top level of a module.
        static: what it needs to know, hashable.
        key: random key.
        base: the weight, an array or the shape of one.
        axes: for each array, the base's axis of each of its dimensions, None for the rank.

    Returns:
        The arrays.
    """
    base = stand_in(base)
    typed = explicit(base)
    with jax.threefry_partitionable(True):  # else the values depend on the sharding
        if typed is not None and isinstance(key, Tracer) and _draws_are_typed(key):
            placed = tuple(along(typed, kept) for kept in axes)
            automatic: Any = jax.sharding.auto_axes(
                lambda key: tuple(build(key, static)), out_sharding=placed
            )
            arrays = automatic(key)
        elif isinstance(base, Tracer):
            arrays = build(key, static)
        else:
            return _make_placed(build, static, key, base, axes)
        if not isinstance(base, Tracer):
            return arrays
        return [_follow(x, base, kept) for x, kept in zip(arrays, axes, strict=True)]


def run(
    build: Callable[..., Any],
    static: Hashable,
    args: Sequence[Any],
    base: Any,
    axes: Any,
) -> Any:
    """Return the arrays of ``build(*args, static)``, sharded as the axes of a base that they have.

    Args:
        build: a pure function at the top level of a module.
        static: what it needs to know, hashable.
        args: what it computes them from, the base among them.
        base: the weight, an array.
        axes: for each array of the tree, the base's axis of each of its dimensions.
    """
    base = stand_in(base)
    typed, known = explicit(base), of(base)

    def placed(sharding):
        return jax.tree.map(lambda kept: along(sharding, kept), axes, is_leaf=_is_axes)

    if typed is not None:
        automatic: Any = jax.sharding.auto_axes(
            lambda *args: build(*args, static), out_sharding=placed(typed)
        )
        return jax.jit(automatic)(*args)
    if isinstance(base, Tracer):
        return build(*args, static)
    return jax.jit(build, static_argnums=len(args), out_shardings=known and placed(known))(
        *args, static
    )


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(axis, int | None) for axis in x)


def _draws_are_typed(key: jax.Array) -> bool:
    """Tell whether what is drawn from a traced key has a type that says replicated."""
    return explicit(key) is not None or bool(jax.sharding.get_abstract_mesh().explicit_axes)


def _make_placed(
    build: Any, static: Any, key: jax.Array, base: Any, axes: Sequence[Axes]
) -> Sequence[jax.Array]:
    """Return the arrays of `make` for a base that is no tracer."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        known = of(base)
        placed = None if known is None else tuple(along(known, kept) for kept in axes)
        return jax.jit(build, static_argnums=1, out_shardings=placed)(_unbound(key), static)


def _unbound(key: jax.Array) -> jax.Array:
    """Return a key that is bound to no device, so that it can be used on all."""
    if isinstance(key, Tracer) or not key.committed:
        return key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.asarray(np.asarray(key))
    data = jnp.asarray(np.asarray(jax.random.key_data(key)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _follow(array: jax.Array, base: jax.Array, axes: Axes) -> jax.Array:
    """Return a traced array, its sharding bound to that of a traced base."""
    base, mesh = jax.lax.stop_gradient(base), jax.typeof(base).sharding.mesh
    if (known := explicit(base)) is not None:
        array = jax.sharding.reshard(array, along(known, axes))
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    if mesh.manual_axes or is_key:
        return array
    if mesh.are_all_axes_explicit:  # all is said; but a base that nothing uses loses its devices
        return jax.lax.optimization_barrier((array, base))[0]
    kept = {axis: d for d, axis in enumerate(axes) if axis is not None}
    like = jnp.max(base, axis=tuple(axis for axis in range(base.ndim) if axis not in kept))
    like = like.transpose([sorted(kept).index(axis) for axis in kept]).astype(array.dtype)
    like = jax.lax.broadcast_in_dim(like, array.shape, tuple(kept.values()))
    # never taken, which the compiler cannot know, and elementwise: both have one sharding
    return jax.lax.select(jax.lax.optimization_barrier(jnp.array(True)), array, like)
