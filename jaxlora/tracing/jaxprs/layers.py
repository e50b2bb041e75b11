"""The layers of a program: where equation after equation it does what it did a while before.

A program no longer tells which functions it was written with, and few libraries name them in it.
But the layers of a network are the same equations, written out once for each. So they are found as
a stretch of the program that repeats itself, and cut where the fewest values go from one layer to
the next: in a network that is the residual stream.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

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
    if len(eqns) < _FEWEST * _SHORTEST:
        return [(eqns, None)]
    pieces = [*_pieces(eqns, np.array([*map(keys.does, eqns)]))]
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


def _pieces(eqns: Sequence[Eqn], does: np.ndarray) -> Iterator[Sequence[Eqn]]:
    """Cut a program where it repeats itself, and what is before and after that as well."""
    start, stop, period = _stretch(does)
    if not period:
        yield from [eqns] if len(eqns) else ()
        return
    cuts = _cuts(eqns, start, stop, period)
    yield from _pieces(eqns[: cuts[0]], does[: cuts[0]])
    yield from (eqns[i:j] for i, j in itertools.pairwise(cuts))
    yield from _pieces(eqns[cuts[-1] :], does[cuts[-1] :])


def _cuts(eqns: Sequence[Eqn], start: int, stop: int, period: int) -> Sequence[int]:
    """Return where the layers of a stretch begin and the last ends; its bounds if they differ."""
    crossing = _crossing(eqns, start)[start + period : start + 2 * period]
    for i in np.argsort(crossing, kind="stable")[:_TRIED]:
        cuts = range(start + int(i), stop + 1, period)
        if len(cuts) > _FEWEST and _are_named_alike(*(eqns[j : j + period] for j in cuts[:2])):
            return cuts
    return start, stop


def _stretch(does: np.ndarray) -> tuple[int, int, int]:
    """Return start, end and period of the longest stretch that repeats itself; zeros for none."""
    last: dict[int, int] = {}
    periods: Counter[int] = Counter()
    for i, what in enumerate(does.tolist()):
        if what in last:
            periods[i - last[what]] += 1
        last[what] = i
    found = [(0, 0, 0)]
    long = Counter({period: n for period, n in periods.items() if period >= _SHORTEST})
    for period, _ in long.most_common(_TRIED):
        differ = np.flatnonzero(does[:-period] != does[period:])
        bounds = [-1, *differ.tolist(), len(does) - period]
        before, after = max(itertools.pairwise(bounds), key=lambda pair: pair[1] - pair[0])
        if after - before > (_FEWEST - 1) * period:
            found.append((before + 1, after + period, period))
    return max(found, key=lambda bounds: bounds[1] - bounds[0] - bounds[2])


def _crossing(eqns: Sequence[Eqn], start: int) -> np.ndarray:
    """Return by position how many variables are made between the start and it, and read after."""
    made = {var: i for i, eqn in enumerate(eqns[start:], start) for var in eqn.outvars}
    read = {
        atom: i
        for i, eqn in enumerate(eqns)
        for atom in eqn.invars
        if isinstance(atom, Var) and atom in made
    }
    change = np.zeros(len(eqns) + 1, int)
    for var, i in read.items():
        change[made[var] + 1] += 1
        change[i + 1] -= 1
    return change.cumsum()


def _are_named_alike(layer: Sequence[Eqn], other: Sequence[Eqn]) -> bool:
    """Tell whether two layers have the same name scopes within those of all of the layer."""
    depth, depth_of_other = (len(compat.common_scopes(eqns)) for eqns in (layer, other))
    return all(
        compat.scopes(eqn)[depth:] == compat.scopes(same)[depth_of_other:]
        for eqn, same in zip(layer, other, strict=True)
    )
