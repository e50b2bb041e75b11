"""Formulas as MathML, which browsers draw themselves: no script from a network, as MathJax is."""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def _write(translator: HTML5Translator, node: nodes.Element, *, is_block: bool) -> None:
    try:
        translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=is_block))
    except MathError as error:
        logger.warning("no formula: %s", error, location=node)
    raise nodes.SkipNode


def write_inline(translator: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula in a line."""
    _write(translator, node, is_block=False)


def write_block(translator: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula of its own."""
    _write(translator, node, is_block=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
