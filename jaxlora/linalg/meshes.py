"""Computations on stacks of matrices on a mesh of any kind.

On an Explicit mesh arrays have their shardings in their types, and JAX decomposes none whose rows
or columns are sharded. Here the compiler decides about what is inside, as on an Auto mesh.
"""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.types import Function, PyTree
from jaxlora.weights import memory, sharding


def run(compute: Function, args: tuple[PyTree, ...], *, stack: int = 0, **static: Any) -> Any:
    """Return ``compute(*args, **static)``.

    Args:
        compute: a function.
        args: what it takes, trees of arrays.
        stack: how many axes, the first of all that is returned, are sharded as those of the first
            array are; nothing else of it is.
        **static: what else it takes, no arrays.
    """
    bound, args = functools.partial(compute, **static), memory.on_device(args)
    types = filter(None, map(sharding.explicit, jax.tree.leaves(args)))
    if (typed := next(types, None)) is None:
        return bound(*args)
    spec = PartitionSpec(*typed.spec[:stack])
    automatic: Any = jax.sharding.auto_axes(bound, out_sharding=NamedSharding(typed.mesh, spec))
    return jax.jit(automatic)(*args)
