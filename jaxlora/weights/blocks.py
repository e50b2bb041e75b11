"""Parts of a weight: blocks of one leaf that have adapters of their own.

Query, key and value are often one kernel, and the layers of a scanned model one stack. A part
is named as NumPy slices an array, behind the path: ``attention/qkv/kernel[:, 0:64]``.
"""

import re
from collections.abc import Container, Sequence

Part = tuple[tuple[int, int] | None, ...]  # (start, stop) of each axis, None for all of it


def parse(name: str) -> tuple[str, str | None]:
    """Return the path in a name, and what stands in brackets at its end, if anything.

    >>> parse("qkv/kernel[:, 0:64]"), parse("qkv/kernel")
    (('qkv/kernel', ':, 0:64'), ('qkv/kernel', None))
    """
    found = re.fullmatch(r"(.+)\[([^\[\]]*)\]", name)
    return (found[1], found[2]) if found else (name, None)


def is_part(name: str) -> bool:
    """Tell whether a name ends in slices, and not in the brackets of a regular expression.

    >>> is_part("qkv/kernel[:, 0:64]"), is_part("block_[0-3]")
    (True, False)
    """
    text = parse(name)[1]
    return text is not None and all(_slices(text))


def _slices(text: str) -> list[re.Match[str] | None]:
    return [re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", piece) for piece in text.split(",")]


def locate(name: str, leaves: Container[str]) -> tuple[str, str | None]:
    """Return what `parse` does, except for a leaf whose own name ends in brackets."""
    return (name, None) if name in leaves else parse(name)


def resolve(text: str | None, shape: Sequence[int]) -> Part | None:
    """Return the part of a weight of some shape, None for all of it.

    Args:
        text: slices ``start:stop`` for the first axes, separated by commas; None is no part.
        shape: shape of the weight.

    Raises:
        ValueError: it is no run of slices, has too many, or one of them is empty.

    >>> resolve("-4:, :", (12, 3))
    ((8, 12), None)
    """
    if text is None:
        return None
    slices = _slices(text)
    if not all(slices) or len(slices) > len(shape):
        raise ValueError(
            f"a part must be slices as [:, 0:64], at most one for each axis of the weight's shape "
            f"{tuple(shape)}: got [{text}]"
        )
    part: list[tuple[int, int] | None] = [None] * len(shape)
    for d, (found, size) in enumerate(zip(slices, shape, strict=False)):
        bounds = (int(bound) if bound else None for bound in found.groups()) if found else ()
        start, stop, _ = slice(*bounds).indices(size)
        if start >= stop:
            raise ValueError(f"the part [{text}] of a weight of shape {tuple(shape)} is empty")
        part[d] = (start, stop)
    return normal(part, shape)


def normal(part: Sequence[tuple[int, int] | None], shape: Sequence[int]) -> Part | None:
    """Return a part with None for whole axes, or None for all of a weight of some shape.

    >>> normal([(0, 12), (1, 3)], (12, 3)), normal([None, (0, 3)], (12, 3))
    ((None, (1, 3)), None)
    """
    pairs = zip(part, shape, strict=True)
    bounds = tuple(None if found == (0, size) else found for found, size in pairs)
    return bounds if any(bounds) else None


def name(path: str, part: Part | None) -> str:
    """Return the name of a part of the leaf at a path.

    >>> name("qkv/kernel", (None, (0, 64)))
    'qkv/kernel[:, 0:64]'
    """
    if part is None:
        return path
    slices = [":" if bounds is None else f"{bounds[0]}:{bounds[1]}" for bounds in part]
    return f"{path}[{', '.join(slices)}]"


def shape(part: Part | None, whole: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a part of a weight of shape ``whole``."""
    if part is None:
        return tuple(whole)
    around = padding(part, whole)
    return tuple(size - low - high for size, (low, high) in zip(whole, around, strict=True))


def slices(part: Part | None) -> tuple[slice, ...]:
    """Return the index of a part, of all of the weight for None."""
    return tuple(slice(*bounds) if bounds else slice(None) for bounds in part or ())


def padding(part: Part | None, whole: Sequence[int]) -> list[tuple[int, int]]:
    """Return how much of the weight lies before and behind a part, for each axis."""
    bounds = part or [None] * len(whole)
    return [(b[0], size - b[1]) if b else (0, 0) for b, size in zip(bounds, whole, strict=True)]


def has_all_of(part: Part | None, axes: Sequence[int]) -> bool:
    """Tell whether a part has all of a weight along some axes."""
    return all(bounds is None or axis not in axes for axis, bounds in enumerate(part or ()))


def largest_divisor(size: int, most: int) -> int:
    """Return the largest divisor of a size that is not above a bound of 1 or more.

    >>> largest_divisor(12, 5)
    4
    """
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0)


def overlap(one: Part | None, other: Part | None) -> bool:
    """Tell whether two parts of a weight have an element in common."""
    pairs = zip(one, other, strict=True) if one and other else ()
    return all(not (a and b) or (a[0] < b[1] and b[0] < a[1]) for a, b in pairs)
