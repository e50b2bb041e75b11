"""Plain-text tables in which repeated blocks are one row."""

import re
from collections.abc import Sequence


def fold(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, int, tuple[str, ...]]]:
    """Join rows that differ only in the numbers of their path.

    Args:
        rows: path first, then cells.

    Returns:
        For each group, in order of appearance: the path, with the numbers that differ as
        ``{0..11}``; how many rows it stands for; the cells.

    >>> fold([("block_0/w", "(4, 4)"), ("block_1/w", "(4, 4)"), ("head/w", "(4, 2)")])
    [('block_{0..1}/w', 2, ('(4, 4)',)), ('head/w', 1, ('(4, 2)',))]
    """
    groups: dict[tuple, list[list[str]]] = {}
    for path, *cells in rows:
        parts = re.split(r"(\d+)", path)
        groups.setdefault((tuple(parts[::2]), *cells), []).append(parts[1::2])
    folded = []
    for (text, *cells), numbers in groups.items():
        spans = [_span(sorted(set(column), key=int)) for column in zip(*numbers, strict=True)]
        path = "".join(a + b for a, b in zip(text, [*spans, ""], strict=True))
        folded.append((path, len(numbers), tuple(cells)))
    return folded


def _span(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    is_run = int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
    return f"{{{numbers[0]}..{numbers[-1]}}}" if is_run else f"{{{','.join(numbers)}}}"


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a header in aligned columns; the first column is flush left."""
    table = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def render_folded(header: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table of rows with a path first, repeated blocks folded."""
    folded = [
        (path if count == 1 else f"{path} x{count}", *cells) for path, count, cells in fold(rows)
    ]
    return render(header, folded)
