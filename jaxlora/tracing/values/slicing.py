"""What `slice` and `dynamic_slice` do, as one operation for each dimension that they cut."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

Cut = tuple[Any, ...]  # a dimension, an operation (array, axis, *operands), and its operands


def of(eqn: Any, shape: Sequence[int], *starts: Any) -> list[Cut]:
    """Return the cuts of an equation, for each dimension that gets smaller.

    Args:
        eqn: a slice or a dynamic slice.
        shape: shape of what it cuts.
        *starts: where a dynamic slice starts.
    """
    sizes = eqn.outvars[0].aval.shape
    smaller = [d for d, size in enumerate(sizes) if size != shape[d]]
    if starts:
        return [(d, _window(sizes[d]), starts[d]) for d in smaller]
    params = eqn.params
    strides = params["strides"] or (1,) * len(sizes)
    bounds = [*zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
    return [(d, between(*bounds[d])) for d in smaller]


def between(start: int, end: int, stride: int = 1) -> Callable[[Any, int], Any]:
    """Return the operation that takes what lies between two indices along an axis."""
    return lambda x, axis: lax.slice_in_dim(x, start, end, stride, axis)


def _window(size: int) -> Callable[[Any, int, Any], Any]:
    def window(x, axis, start):
        return lax.dynamic_slice_in_dim(x, start, size, axis, allow_negative_indices=False)

    return window
