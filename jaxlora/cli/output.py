"""What commands print: a table or JSON on the standard output, progress on the standard error."""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from jaxlora.types import Json

T = TypeVar("T")

_UNBOUNDED = 10_000
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on the standard output.")]


def print_json(report: Json) -> None:
    """Print a report as JSON; a number that is not finite is null."""
    print(json.dumps(_finite(report), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
    return value


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a header; as wide as they are where no terminal bounds them."""
    table = Table(*header, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = _UNBOUNDED
        console.width = Measurement.get(console, console.options, table).maximum
    console.print(table)


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:#.4g}"


def spread(values: Iterable[int]) -> str:
    """Return the smallest and the largest of some numbers."""
    found = sorted({*values})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def shape(sizes: Sequence[int]) -> str:
    """Return a shape as Python writes it."""
    return str(tuple(sizes))


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield items while a bar on a terminal shows how many are done."""
    with bar() as shown:
        yield from shown.track(items, description=what)


def bar() -> Progress:
    """Return bars on the standard error, shown where that is a terminal."""
    console = Console(file=sys.stderr)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def working(what: str) -> AbstractContextManager[object]:
    """Return a context in which a terminal shows that something is being done."""
    console = Console(file=sys.stderr)
    return console.status(what) if console.is_terminal else contextlib.nullcontext()
