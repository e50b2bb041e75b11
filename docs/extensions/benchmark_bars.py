"""Bars above the tables of benchmarks, where a page asks for them, see ``docs/figures.py``."""

import html
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

sys.path.append(str(Path(__file__).parent.parent))

import figures

OURS = {"lora", "jaxlora"}


class Bars(SphinxTransform):
    """Draw the bars, and mark the tables and what stands below them."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Change the page that is read."""
        del kwargs
        for comment in list(self.document.findall(nodes.raw)):
            if (asked := figures.options(comment.astext())) is None:
                continue
            kind, name, listed = asked
            siblings, at = comment.parent.children, comment.parent.index(comment)
            for below in siblings[at + 1 :]:
                if isinstance(below, nodes.raw):  # the comment at the end
                    break
                assert isinstance(below, nodes.Element)
                below["classes"].append("figures" if isinstance(below, nodes.table) else "measured")
            if kind == "benchmark" and "bars" in listed:
                drawn = nodes.raw("", "".join(_of_benchmark(name, listed)), format="html")
                comment.parent.insert(at + 1, drawn)


def _of_benchmark(name: str, listed: dict[str, list[str]]) -> list[str]:
    """Return the bars that are asked for, of each device."""
    labels = dict(zip(listed["columns"], listed["labels"], strict=True))
    return [
        _bars({row: x[column] for row, x in rows.items()}, labels[column])
        for _, rows in figures.benchmark(name, listed.get("rows", []))
        for column in listed["bars"]
    ]


def _bars(measured: dict[str, float], label: str) -> str:
    """Return horizontal bars as HTML that follows the colors of the page."""
    top = max(measured.values())
    lines = [
        f'<div class="bar{" ours" if name.rpartition(": ")[2] in OURS else ""}">'
        f'<span class="name">{html.escape(name)}</span>'
        f'<span class="track"><span class="fill" style="width:{value / top:.1%}"></span></span>'
        f'<span class="figure">{value:.2f}</span></div>'
        for name, value in sorted(measured.items(), key=lambda item: -item[1])
    ]
    return f'<div class="bars"><div class="label">{html.escape(label)}</div>{"".join(lines)}</div>'


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_transform(Bars)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
