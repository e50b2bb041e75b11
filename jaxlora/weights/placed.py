"""Compute arrays where a weight is: each is sharded as the axes of the weight that it has.

What is known of a weight's sharding depends on where it is met, see `jaxlora.weights.sharding`.
Inside of `jax.jit` on an Auto mesh nothing is: there a new array is made to look, to the compiler
alone, as if it were computed from the weight, and its sharding follows.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh

from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import memory
from jaxlora.weights.quantized import stand_in, values
from jaxlora.weights.sharding import Axes, along, concrete, explicit


def make(
    build: Callable[..., Sequence[jax.Array]],
    static: Hashable,
    key: jax.Array,
    base: Leaf,
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
    build: Function,
    static: Hashable,
    args: Sequence[PyTree],
    base: Leaf,
    axes: PyTree,
) -> Leaf:
    """Return the arrays of ``build(*args, static)``, sharded as the axes of a base that they have.

    Args:
        build: a pure function at the top level of a module.
        static: what it needs to know, hashable.
        args: what it computes them from, the base among them.
        base: the weight, an array.
        axes: for each array of the tree, the base's axis of each of its dimensions.
    """
    args, base = memory.on_device((tuple(args), stand_in(base)))
    typed, known = explicit(base), concrete(base)

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


@jax.jit
def plain(weight: Leaf) -> jax.Array:
    """Return what a quantized weight stands for, where its codes are."""
    return memory.beside(weight, values(memory.on_device(weight)))


def may_be_sharded(base: Leaf) -> bool:
    """Tell whether a base is on a mesh, or is traced, so that it may be on one."""
    return isinstance(stand_in(base), Tracer) or concrete(base) is not None


def _is_axes(x: Leaf) -> bool:
    return isinstance(x, tuple) and all(isinstance(axis, int | None) for axis in x)


def _draws_are_typed(key: jax.Array) -> bool:
    """Tell whether what is drawn from a traced key has a type that says replicated."""
    return explicit(key) is not None or bool(jax.sharding.get_abstract_mesh().explicit_axes)


def _make_placed(
    build: Function, static: Hashable, key: jax.Array, base: Leaf, axes: Sequence[Axes]
) -> Sequence[jax.Array]:
    """Return the arrays of `make` for a base that is no tracer."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        known = concrete(base)
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
