"""Tables and bars of what the benchmarks measured, made from their results with the pages.

The directive takes the name of a benchmark, and shows its results for the newest version on each
device in ``benchmarks/results``::

    ```{benchmark} train_step
    :columns: step_ms, over_floor
    :labels: ms a step, over the frozen model
    :bars: over_floor
    ```

The directive ``claim`` shows the table of a claim that ``examples/reproduce.py`` has tried.
"""

import html
import json
import math
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results"
OURS = {"lora", "jaxlora"}
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


def results(name: str) -> dict[str, Path]:
    """Return the results of a benchmark by device, those of the newest version."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.stem.rpartition("_")[2])]

    named = re.compile(re.escape(name) + r"_([^_]+)_[^_]+\.json")
    found = {path: named.fullmatch(path.name) for path in RESULTS.glob("*.json")}
    newest = sorted((path for path, match in found.items() if match), key=version)
    return {path.stem.split("_")[-2]: path for path in newest}


def rows(measured: Any) -> dict[str, dict[str, Any]]:
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


def shown(column: str, value: Any) -> str:
    """Return a figure as a reader wants it."""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "-"
    if column.startswith("held_out"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if column.endswith(("_ms", "_mb", "_at_most")) else f"{value:.2f}"


def bars(figures: dict[str, float], label: str) -> str:
    """Return horizontal bars as HTML that follows the colors of the page."""
    top = max(figures.values())
    lines = [
        f'<div class="bar{" ours" if name.rpartition(": ")[2] in OURS else ""}">'
        f'<span class="name">{html.escape(name)}</span>'
        f'<span class="track"><span class="fill" style="width:{value / top:.1%}"></span></span>'
        f'<span class="figure">{value:.2f}</span></div>'
        for name, value in sorted(figures.items(), key=lambda item: -item[1])
    ]
    return f'<div class="bars"><div class="label">{html.escape(label)}</div>{"".join(lines)}</div>'


def about(told: dict[str, Any]) -> str:
    """Return what was measured, and on what, in a line."""
    versions = [
        f"{name} {told[name]}" for name in ("jax", "torch", "peft", "python") if name in told
    ]
    options = told.get("options", told)
    plain = {k: v for k, v in options.items() if isinstance(v, int | float | str)}
    sizes = [f"{k} {v}" for k, v in plain.items() if v is not False and k not in UNTOLD | {*told}]
    return ", ".join([*versions, told.get("device", ""), *sizes]).replace(", ,", ",")


class Benchmark(SphinxDirective):
    """The directive ``benchmark``."""

    required_arguments = 1
    option_spec: ClassVar = {
        "columns": directives.unchanged_required,
        "labels": directives.unchanged_required,
        "bars": directives.unchanged_required,
        "rows": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """Return a table, and bars if they are asked for, for each device."""
        found = results(self.arguments[0])
        if not found:
            raise self.error(f"no results of {self.arguments[0]!r} in {RESULTS}")
        return [node for path in found.values() for node in self._show(path)]

    def _list(self, option: str) -> list[str]:
        return [word.strip() for word in self.options.get(option, "").split(",") if word.strip()]

    def _show(self, path: Path) -> list[nodes.Node]:
        self.env.note_dependency(str(path))
        told = json.loads(path.read_text())
        wanted = self._list("rows")
        found = {
            NAMES.get(name, name): row
            for name, row in rows(told["results"]).items()
            if not wanted or name in wanted
        }
        columns, shown_nodes = self._list("columns"), []
        labels = dict(zip(columns, self._list("labels") or columns, strict=True))
        for column in self._list("bars"):
            drawn = bars({name: row[column] for name, row in found.items()}, labels[column])
            shown_nodes.append(nodes.raw("", drawn, format="html"))
        head = ["", *labels.values()]
        body = [[name, *(shown(c, row[c]) for c in columns)] for name, row in found.items()]
        caption = nodes.paragraph("", about(told), classes=["measured"])
        return [*shown_nodes, _table(head, body), caption]


class Claim(SphinxDirective):
    """The directive ``claim``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table, and what it was made with."""
        path = RESULTS / "claims" / f"{self.arguments[0]}.json"
        if not path.exists():
            raise self.error(f"no such claim has been tried: {path}")
        self.env.note_dependency(str(path))
        told = json.loads(path.read_text())
        caption = nodes.paragraph("", about(told), classes=["measured"])
        return [_table(told["columns"], told["rows"]), caption]


def _table(head: list[str], body: list[list[str]]) -> nodes.table:
    def row(cells: list[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec("", colwidth=1) for _ in head), cols=len(head))
    group += nodes.thead("", row(head))
    group += nodes.tbody("", *map(row, body))
    return nodes.table("", group, classes=["figures"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_directive("benchmark", Benchmark)
    app.add_directive("claim", Claim)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
