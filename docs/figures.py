"""Write what was measured into the pages, as tables.

A page says in a comment which figures it shows: those of a benchmark for the newest version on each
device in ``benchmarks/results``, or the table of a claim that ``examples/reproduce.py`` has tried.
The tables stand below it, up to the next comment::

    <!-- benchmark train_step
    columns: step_ms, over_floor
    labels: ms a step, over the frozen model
    bars: over_floor
    -->

    <!-- end -->

``rows`` leaves others out, ``bars`` are drawn on the website alone.

    python docs/figures.py              # write the tables of all pages
"""

import json
import math
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- (?:benchmark|claim) .*?-->\n).*?(<!-- end -->)", re.DOTALL)
COMMENT = re.compile(r"<!-- (benchmark|claim) (\S+)\s(.*)-->\s*", re.DOTALL)
NAMES = {
    "floor": "frozen model",
    "full": "full fine-tuning",
    "lora": "jaxlora",
    "per call": "W + scaling · a b, each call",
    "naive": "(x a) b, by hand",
    "factored": "jaxlora, factored",
    "weight-side": "jaxlora, weight-side",
    "dora": "jaxlora, with magnitudes",
    "int8": "jaxlora over int8",
    "nf4": "jaxlora over nf4",
    "peft": "PEFT on PyTorch",
}
UNTOLD = {"rounds", "warmup", "targets", "variants", "powers", "kinds", "iterations"}


def filled(text: str) -> str:
    """Return a page with the tables that the results have now."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{_tables(found[1])}\n{found[2]}", text)


def options(comment: str) -> tuple[str, str, dict[str, list[str]]] | None:
    """Return the kind, the name and the options of a comment, None for any other."""
    if (found := COMMENT.fullmatch(comment)) is None:
        return None
    lines = (line.partition(":") for line in found[3].strip().splitlines())
    listed = {key: [word.strip() for word in words.split(",")] for key, _, words in lines}
    return found[1], found[2], listed


def benchmark(name: str, only: list[str]) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Return what is told of a benchmark and its rows by name, for each device.

    Args:
        name: of the benchmark.
        only: names of the rows; none for all.
    """

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.stem.rpartition("_")[2])]

    named = re.compile(re.escape(name) + r"_([^_]+)_[^_]+\.json")
    found = {path: named.fullmatch(path.name) for path in RESULTS.glob("*.json")}
    newest = sorted((path for path, match in found.items() if match), key=version)
    if not newest:
        raise ValueError(f"no results of {name!r} in {RESULTS}")
    told = {path.stem.split("_")[-2]: json.loads(path.read_text()) for path in newest}
    return [
        (each, {NAMES.get(key, key): x for key, x in rows.items() if not only or key in only})
        for each in told.values()
        for rows in [_rows(each["results"])]
    ]


def _rows(measured: Any) -> dict[str, dict[str, Any]]:
    """Return the figures of each row by its name.

    Args:
        measured: figures by name; figures by name and another key, as a learning rate; a list of
            rows, of which what is not a float is the name; or the figures of one row.
    """
    if isinstance(measured, list):
        return {
            " ".join(str(x) for x in row.values() if not isinstance(x, float)): row
            for row in measured
        }
    if not isinstance(next(iter(measured.values())), dict):
        return {"": measured}
    return {name: _flat(row) for name, row in measured.items()}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(next(iter(row.values())), dict):
        return row
    return {f"{name} at {key}": x for key, inner in row.items() for name, x in inner.items()}


def _tables(comment: str) -> str:
    """Return the tables of a comment, with a line below each that says what it was made with."""
    kind, name, listed = options(comment) or ("", "", {})
    if kind == "claim":
        told = json.loads((RESULTS / "claims" / f"{name}.json").read_text())
        return _table(told["columns"], told["rows"], told)
    columns = listed["columns"]
    head = ["", *listed["labels"]]
    made = [
        _table(head, [[row, *(_shown(c, x[c]) for c in columns)] for row, x in rows.items()], told)
        for told, rows in benchmark(name, listed.get("rows", []))
    ]
    return "\n".join(made)


def _table(head: list[str], body: list[list[str]], told: dict[str, Any]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    cells = ([re.sub(r"([|*_<`])", r"\\\1", cell) for cell in line] for line in lines)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"{rows}\n\n*{_about(told)}*\n"


def _shown(column: str, value: Any) -> str:
    """Return a figure as a reader wants it."""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "-"
    if column.startswith("held_out"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if column.endswith(("_ms", "_mb", "_at_most")) else f"{value:.2f}"


def _about(told: dict[str, Any]) -> str:
    """Return what was measured, and on what, in a line."""
    versions = [
        f"{name} {told[name]}" for name in ("jax", "torch", "peft", "python") if name in told
    ]
    given = told.get("options", told)
    plain = {k: v for k, v in given.items() if isinstance(v, int | float | str)}
    sizes = [f"{k} {v}" for k, v in plain.items() if v is not False and k not in UNTOLD | {*told}]
    return ", ".join([*versions, told.get("device", ""), *sizes]).replace(", ,", ",")


def main() -> None:
    """Write the tables of all pages."""
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            print(page)


if __name__ == "__main__":
    main()
