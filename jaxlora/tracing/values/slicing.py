"""What `slice` and `dynamic_slice` do, as one operation for each dimension that they cut."""

from collections.abc import Callable, Sequence

import jax
from jax import lax

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Eqn

Change = Callable[..., jax.Array]  # of an array, an axis and operands
Cut = tuple[int, Change, *tuple[jax.Array, ...]]  # a dimension, what is done to it, operands


def cuts(eqn: Eqn, shape: Sequence[int], *starts: jax.Array) -> list[Cut]:
    """Return the cuts of an equation, for each dimension that gets smaller.

    Args:
        eqn: a slice or a dynamic slice.
        shape: shape of what it cuts.
        *starts: where a dynamic slice starts.
    """
    sizes = compat.shape(eqn.outvars[0])
    smaller = [d for d, size in enumerate(sizes) if size != shape[d]]
    if starts:
        return [(d, _window(sizes[d]), starts[d]) for d in smaller]
    params = eqn.params
    strides = params["strides"] or (1,) * len(sizes)
    bounds = [*zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
    return [(d, between(*bounds[d])) for d in smaller]


def between(start: int, end: int, stride: int = 1) -> Change:
    """Return the operation that takes what lies between two indices along an axis."""
    return lambda x, axis: lax.slice_in_dim(x, start, end, stride, axis)


def _window(size: int) -> Change:
    def window(x, axis, start):
        return lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)

    return window
