"""What one module of a file is of an adapter: its factors, joined with those of other modules.

A file has a pair of factors for each module. A leaf that is a stack of modules has one adapter for
all whose rank and alpha are equal, or one for each run of entries where they are not.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxlora.formats import placing
from jaxlora.messages import checks
from jaxlora.types import Leaf
from jaxlora.weights import blocks
from jaxlora.weights.adapters import Adapter, Adapters
from jaxlora.weights.blocks import Part
from jaxlora.weights.roles import Roles

Box = tuple[tuple[int, int], ...]  # (start, stop) of every axis of a leaf


@dataclasses.dataclass(frozen=True)
class Piece:
    """The factors of a block of a leaf.

    Attributes:
        path: path of the leaf.
        box: the block.
        roles: roles of the leaf's axes.
        shape: shape of the leaf.
        alpha: numerator of the scaling.
        a: ``(*stack, *in, rank)`` of the block.
        b: ``(*stack, rank, *out)`` of the block.
        magnitude: ``(*stack, *out)`` of the block, or None.
    """

    path: str
    box: Box
    roles: Roles
    shape: tuple[int, ...]
    alpha: float
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None

    @property
    def rank(self) -> int:
        """Number of columns of ``a``."""
        return self.a.shape[-1]

    def joins(self) -> tuple[object, ...]:
        """Return what is equal in pieces that can be one adapter."""
        dtypes = tuple(x.dtype for x in (self.a, self.b, self.magnitude) if x is not None)
        rest = tuple(bounds for axis, bounds in enumerate(self.box) if axis not in self.roles.stack)
        return self.path, rest, self.rank, self.alpha, dtypes, self.magnitude is None


def box(part: Part | None, shape: Sequence[int]) -> Box:
    """Return the bounds of a part along every axis of a leaf."""
    bounds = part or [None] * len(shape)
    return tuple(b or (0, size) for b, size in zip(bounds, shape, strict=True))


def adapters(pieces: Iterable[Piece]) -> dict[str, Adapter]:
    """Return adapters of NumPy's arrays by name, as few as hold all pieces."""
    groups = collections.defaultdict(list)
    for piece in pieces:
        groups[piece.joins()].append(piece)
    found = {}
    for group in groups.values():
        for piece in _joined(group):
            part = blocks.normal(piece.box, piece.shape)
            arrays = {name: getattr(piece, name) for name in Adapter.fields}
            static = {"roles": piece.roles, "alpha": piece.alpha, "shape": piece.shape}
            found[blocks.name(piece.path, part)] = Adapter(**arrays, **static, block=part)
    return dict(sorted(found.items()))


def placed(found: Adapters, where: str) -> Adapters:
    """Return what was read of a file on the device; warn if it changes nothing of a program.

    It is looked at before, for NumPy compiles nothing.
    """
    if not any(map(_changes, found.values())):
        checks.warn(
            f"the adapters of {where} change nothing: all their products are 0", UserWarning
        )
    put = placing.put(found)
    return {name: put[name] for name in found}  # which JAX has sorted


def _changes(term: Leaf) -> bool:
    """Tell whether something trained changes what it is of."""
    is_product = isinstance(term, Adapter) and term.magnitude is None
    return not is_product or all(factor.astype(bool).any() for factor in (term.a, term.b))


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Return pieces of one leaf, those that lie side by side along its stack axes as one."""
    for dim, axis in reversed([*enumerate(pieces[0].roles.stack)]):
        rows = collections.defaultdict(list)
        for piece in pieces:
            rows[piece.box[:axis] + piece.box[axis + 1 :]].append(piece)
        pieces = [run for row in rows.values() for run in _runs(row, dim, axis)]
    return pieces


def _runs(row: list[Piece], dim: int, axis: int) -> list[Piece]:
    """Return pieces that differ along one axis alone, neighbours as one."""
    runs: list[list[Piece]] = []
    for piece in sorted(row, key=lambda piece: piece.box[axis]):
        if runs and runs[-1][-1].box[axis][1] == piece.box[axis][0]:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return [_as_one(run, dim, axis) for run in runs]


def _as_one(run: list[Piece], dim: int, axis: int) -> Piece:
    first, last = run[0], run[-1]
    bounds = (first.box[axis][0], last.box[axis][1])
    whole = (*first.box[:axis], bounds, *first.box[axis + 1 :])

    def all_of(name):
        arrays = [getattr(piece, name) for piece in run]
        return None if arrays[0] is None else np.concatenate(arrays, dim)

    return dataclasses.replace(first, box=whole, **{n: all_of(n) for n in Adapter.fields})
