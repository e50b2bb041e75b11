"""Products of an input or a result with a vector along some of its axes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.tracing.values import placement
from jaxlora.tracing.values.chain import Name
from jaxlora.weights.adapters import merge_dtype


def scaled_along(
    x: jax.Array,
    names: Sequence[Sequence[Name]],
    sizes: Sequence[Sequence[int]],
    vector: jax.Array,
    vector_names: Sequence[Name],
) -> jax.Array:
    """Return an array times another of some of its axes, as `times`.

    Args:
        x: an array.
        names: names of what each dimension of it is made of.
        sizes: their sizes.
        vector: array with one axis for each of vector_names.
        vector_names: names of its axes, all among those of x.
    """
    flat = [name for dim in names for name in dim]
    order = sorted(range(len(vector_names)), key=lambda i: flat.index(vector_names[i]))
    rest = [i for i, name in enumerate(flat) if name not in vector_names]
    pieces = placement.reshape(x, sizes)
    factor = placement.beside(jnp.expand_dims(vector.transpose(order), rest), pieces)
    return placement.like(times(pieces, factor), x)


@functools.partial(jax.checkpoint, prevent_cse=False)
def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Return the product of two arrays in the dtype of the first.

    It is computed in float32 or wider and rounded once; a derivative keeps no wide array for it.

    Args:
        x: an array.
        factor: an array of as many dimensions, of the same size or of size 1.
    """
    dtype = merge_dtype(x.dtype)
    return (x.astype(dtype) * factor.astype(dtype)).astype(x.dtype)
