"""Count the collectives of a compiled program, by its text."""

import collections
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
OF_FACTORS = 500_000  # bytes, more than a factor of rank 16 has on a device, less than its weight
_BITS = {"f32": 32, "s32": 32, "u32": 32, "bf16": 16, "s8": 8, "u8": 8, "pred": 8, "s4": 4, "u4": 4}
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(-start)?\(.*?channel_id=(\d+)")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_LIMIT = re.compile(r" constant\((\d+)\)")


def count(text: str) -> dict[str, float]:
    """Return the number of collectives of each kind, and the gigabytes of their results.

    Loops count in full, as often as their condition says: it compares a counter with a constant.
    The compiler writes a collective that goes on beside several products at each of them, with one
    channel: it is counted once. ``moved_gb`` is of weights: arrays that are gathered or passed on
    and larger than any factor of an adapter.
    """
    numbers: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for kind, arrays, times in _collectives(text):
        numbers[kind] += times
        sizes[kind] += times * sum(arrays)
        sizes["collectives"] += times * sum(arrays)
        if kind in ("all-gather", "collective-permute"):
            sizes["moved"] += times * sum(size for size in arrays if size > OF_FACTORS)
    row = {f"{kind}s": float(numbers[kind]) for kind in KINDS}
    return row | {f"{kind}_gb": sizes[kind] / 1e9 for kind in (*KINDS, "moved", "collectives")}


def _collectives(text: str) -> Iterator[tuple[str, list[int], int]]:
    """Yield the kind, the bytes of each result and the number of runs of each collective."""
    bodies = {name: body for _, name, body in _COMPUTATION.findall(text)}
    seen = set()
    for name, times in _runs(text, bodies).items():
        for arrays, kind, begins, channel in _COLLECTIVE.findall(bodies[name]):
            if (kind, channel) not in seen:
                seen.add((kind, channel))
                yield kind, _nbytes(kind, arrays, begins), times


def _runs(text: str, bodies: dict[str, str]) -> dict[str, int]:
    """Return how often each computation that the program reaches runs, loops in full."""
    runs: dict[str, int] = {}
    found = [(name, 1) for entry, name, _ in _COMPUTATION.findall(text) if entry]
    while found:
        name, times = found.pop()
        runs[name] = times
        turns = {body: _turns(bodies[condition]) for condition, body in _LOOP.findall(bodies[name])}
        called = dict.fromkeys(_CALLED.findall(bodies[name]))
        found += [(inner, times * turns.get(inner, 1)) for inner in called if inner not in runs]
    return runs


def _turns(condition: str) -> int:
    """Return how often a loop turns, by the text of its condition."""
    (limit,) = _LIMIT.findall(condition)
    return int(limit)


def _nbytes(kind: str, arrays: str, begins: str) -> list[int]:
    """Return the bytes of each result of a collective, from the type of it in the program."""
    found = _ARRAY.findall(arrays)
    if begins and kind == "collective-permute":
        found = found[1:2]  # what is sent, what comes, and two signals
    elif begins and kind == "all-gather":
        found = found[len(found) // 2 :]  # what is sent, then what comes
    sizes = ((_BITS[dtype], map(int, filter(None, dims.split(",")))) for dtype, dims in found)
    return [bits * math.prod(dims) // 8 for bits, dims in sizes]
