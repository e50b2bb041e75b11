"""Which original axes a dimension is made of, through reshape and transpose.

A dimension of a traced weight is a run of *pieces*, major first; a piece is a label and a size.
Labels are roles when a program is evaluated, where a dimension of size 1 has no pieces, and sets
of original axes when sites are looked for. ``(D, N, H)`` reshaped to ``(D, N*H)`` has the
dimensions ``((D,), (N, H))``, and reshaping it back finds the pieces again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

Label = Any  # a role, or a frozenset of original axes
REPEATED = None  # the label, among roles, of a piece that no factor carries
Piece = tuple[Label, int]
Dim = tuple[Piece, ...]
Dims = tuple[Dim, ...]


def from_shape(shape: Sequence[int], labels: Sequence[Label]) -> Dims:
    """Return one piece for each axis longer than 1."""
    return tuple(
        ((label, size),) if size != 1 else () for label, size in zip(labels, shape, strict=True)
    )


def pieces(dims: Dims) -> list[Piece]:
    """Return all pieces in order."""
    return [piece for dim in dims for piece in dim]


def labels(dims: Sequence[Dim]) -> set[Label]:
    """Return the labels of all pieces."""
    return {label for dim in dims for label, _ in dim}


def shape(dims: Dims) -> tuple[int, ...]:
    """Return the size of each dimension."""
    return tuple(math.prod(size for _, size in dim) for dim in dims)


def merge(dims: Dims) -> Dims:
    """Join neighbours of one label within each dimension; a piece of size 1 joins its neighbour."""
    return tuple(_merge(dim) for dim in dims)


def _merge(dim: Dim) -> Dim:
    merged: list[Piece] = []
    for label, size in dim:
        before, length = merged[-1] if merged else (label, 0)
        if before == label and merged:
            merged[-1] = (label, length * size)
        elif merged and 1 in (length, size):
            merged[-1] = (before | label, length * size)  # only sets have pieces of size 1
        else:
            merged.append((label, size))
    return tuple(merged)


def reshape(dims: Dims, new_shape: Sequence[int]) -> Dims | None:
    """Split and regroup the pieces into dimensions of the new sizes.

    Args:
        dims: dimensions as they are.
        new_shape: sizes wanted, of the same product.

    Returns:
        The new dimensions, or None where a boundary would cut a piece unevenly.
    """
    left = pieces(dims)[::-1]
    regrouped = []
    for size in new_shape:
        dim: list[Piece] = []
        if size == 1 and left and left[-1][1] == 1:
            dim.append(left.pop())
        while size > 1:
            label, have = left.pop()
            if size % have == 0:
                dim.append((label, have))
                size //= have
            elif have % size == 0:
                dim.append((label, size))
                left.append((label, have // size))
                size = 1
            else:
                return None
        regrouped.append(tuple(dim))
    return merge(tuple(regrouped))


def order(dims: Dims, permutation: Sequence[int], keep: Callable[[Label], bool]) -> list[int]:
    """Return the permutation of the kept pieces that a permutation of the dimensions makes."""
    positions, count = [], 0
    for dim in dims:
        kept = sum(keep(label) for label, _ in dim)
        positions.append(range(count, count + kept))
        count += kept
    return [position for d in permutation for position in positions[d]]
