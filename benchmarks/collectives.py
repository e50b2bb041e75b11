"""Count the collectives of a compiled program, by its text."""

import collections
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
OF_FACTORS = 500_000  # bytes, more than a factor of rank 16 has on a device, less than its weight
_BITS = {"f32": 32, "s32": 32, "u32": 32, "bf16": 16, "s8": 8, "u8": 8, "pred": 8, "s4": 4, "u4": 4}
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(-start)?\(.*?channel_id=(\d+)")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


def count(text: str) -> dict[str, float]:
    """Return the number of collectives of each kind, and the gigabytes of their results.

    The compiler writes a collective that goes on beside several products at each of them, with one
    channel: it is counted once. A loop's body is counted once as well. ``moved_gb`` is of weights:
    what is gathered or passed on and larger than any factor of an adapter.
    """
    found = {
        (kind, channel): _nbytes(kind, arrays, begins)
        for arrays, kind, begins, channel in _COLLECTIVE.findall(text)
    }
    numbers = collections.Counter(kind for kind, _ in found)
    row = {f"{kind}s": float(numbers[kind]) for kind in KINDS}
    sizes: collections.Counter[str] = collections.Counter()
    for (kind, _), size in found.items():
        sizes[kind] += size
        sizes["moved"] += size * (
            kind in ("all-gather", "collective-permute") and size > OF_FACTORS
        )
    row |= {f"{kind}_gb": sizes[kind] / 1e9 for kind in (*KINDS, "moved")}
    return row | {"collectives_gb": sum(sizes[kind] for kind in KINDS) / 1e9}


def _nbytes(kind: str, arrays: str, begins: str) -> int:
    """Return the bytes of the results of a collective, from the type of it in the program."""
    found = _ARRAY.findall(arrays)
    if begins and kind == "collective-permute":
        found = found[1:2]  # what is sent, what comes, and two signals
    elif begins and kind == "all-gather":
        found = found[len(found) // 2 :]  # what is sent, then what comes
    sizes = ((_BITS[dtype], map(int, filter(None, dims.split(",")))) for dtype, dims in found)
    return sum(bits * math.prod(dims) // 8 for bits, dims in sizes)
