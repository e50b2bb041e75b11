"""The layers of a program: where equation after equation it does what it did a while before.

A program no longer tells which functions it was written with, and few libraries name them in it.
But the layers of a network are the same equations, written out once for each. So they are found as
a stretch of the program that repeats itself, and cut where the fewest values go from one layer to
the next: in a network that is the residual stream.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Eqn, Var
from jaxlora.tracing.jaxprs.keys import Keys, Part

_FEWEST = 3  # layers: of two, one would be run by itself, and the other as the function of both
_SHORTEST = 8  # equations of a layer: fewer are not worth a call
_TRIED = 16  # periods, and places to cut at: the most promising ones

Piece = tuple[Sequence[Eqn], Part | None]  # equations, and what they are as a layer


def cut(
    eqns: Sequence[Eqn],
    keys: Keys,
    part_of: Callable[[Sequence[Eqn]], Part],
    together: Iterable[Collection[Eqn]],
) -> list[Piece]:
    """Cut a program into layers and what stands around them.

    Args:
        eqns: the equations of the program.
        keys: what each of them does.
        part_of: returns equations as a part.
        together: equations that have to stay in one piece.
    """
    bounds = {0, len(eqns)}
    for layers in _found(eqns, keys):
        bounds.update(layers)
    if len(bounds) == 2:
        return [(eqns, None)]
    pieces = [eqns[i:j] for i, j in itertools.pairwise(sorted(bounds))]
    number = {eqn: i for i, piece in enumerate(pieces) for eqn in piece}
    spans = ({number.get(eqn) for eqn in group} for group in together)
    torn = {i for span in spans if len(span) > 1 for i in span}
    parts = [None if i in torn else part_of(piece) for i, piece in enumerate(pieces)]
    keyed = [None if part is None else keys.of(part) for part in parts]
    times = Counter(keyed)
    return [
        (piece, part if times[key] >= _FEWEST else None)
        for piece, part, key in zip(pieces, parts, keyed, strict=True)
    ]


def _found(eqns: Sequence[Eqn], keys: Keys) -> Iterator[range]:
    """Yield where layers begin, and the last ends, for each stretch that repeats itself."""
    if len(eqns) < _FEWEST * _SHORTEST:
        return
    is_free = np.ones(len(eqns), bool)
    read = ((atom, i) for i, eqn in enumerate(eqns) for atom in eqn.invars)
    last_read = {atom: i for atom, i in read if isinstance(atom, Var)}
    for start, stop, period in _stretches([*map(keys.does, eqns)]):
        left = start + np.flatnonzero(is_free[start:stop])
        if left.size < _FEWEST * period or left[-1] - left[0] + 1 > left.size:
            continue
        start, stop = int(left[0]), int(left[-1]) + 1
        cuts = _cuts(eqns, start, stop, period, _crossing(eqns, start, stop, last_read))
        if cuts is not None:
            is_free[cuts[0] : cuts[-1]] = False
            yield cuts


def _stretches(does: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return start, end and period of each stretch that repeats itself, the longest first."""
    periods: Counter[int] = Counter()
    last: dict[int, int] = {}
    for i, what in enumerate(does):
        if i - last.get(what, i) >= _SHORTEST:
            periods[i - last[what]] += 1
        last[what] = i
    found: list[tuple[int, int, int]] = []
    numbers = np.asarray(does)
    for period, _ in periods.most_common(_TRIED):
        differ = np.flatnonzero(numbers[:-period] != numbers[period:])
        for before, after in itertools.pairwise([-1, *differ.tolist(), len(does) - period]):
            if after - before > (_FEWEST - 1) * period:
                found.append((before + 1, after + period, period))
    return sorted(found, key=lambda stretch: stretch[0] - stretch[1] + stretch[2])


def _crossing(
    eqns: Sequence[Eqn], start: int, stop: int, last_read: Mapping[Var, int]
) -> np.ndarray:
    """Return for positions from start how many variables made since are read after each."""
    change = np.zeros(stop - start + 1, int)
    for i, eqn in enumerate(eqns[start:stop]):
        for var in eqn.outvars:
            if var in last_read:
                change[i + 1] += 1
                change[min(last_read[var], stop - 1) - start + 1] -= 1
    return change.cumsum()


def _cuts(
    eqns: Sequence[Eqn], start: int, stop: int, period: int, crossing: np.ndarray
) -> range | None:
    """Return where the layers of a stretch begin, and where the last ends; None if they differ."""
    for i in np.argsort(crossing[period : 2 * period], kind="stable")[:_TRIED].tolist():
        cuts = range(start + i, stop + 1, period)
        if len(cuts) > _FEWEST and _are_named_alike(*(eqns[j : j + period] for j in cuts[:2])):
            return cuts
    return None


def _are_named_alike(layer: Sequence[Eqn], other: Sequence[Eqn]) -> bool:
    """Tell whether two layers have the same name scopes within those of all of the layer."""
    depth, depth_of_other = (len(compat.common_scopes(eqns)) for eqns in (layer, other))
    return all(
        compat.scopes(eqn)[depth:] == compat.scopes(same)[depth_of_other:]
        for eqn, same in zip(layer, other, strict=True)
    )
