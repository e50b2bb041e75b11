"""Link full names in Markdown, as ``jaxlora.merge``, to where the API pages describe them.

Inline code is a link if it is a dotted name of this library, with or without a call behind it. So
the pages read the same on GitHub, which knows no roles, and a name that is not documented is a
broken reference, which Sphinx warns of.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

NAME = re.compile(r"(jaxlora(?:\.\w+)+)(?:\(.*\))?", re.DOTALL)


def link_names(app: Sphinx, document: nodes.document) -> None:
    """Put a reference around every literal that is a name."""
    for literal in list(document.findall(nodes.literal)):
        name = NAME.fullmatch(literal.astext())
        if not name or isinstance(literal.parent, nodes.reference | pending_xref):
            continue
        link = pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=name[1],
            refexplicit=True,
            refwarn=True,
            refdoc=app.env.docname,
        )
        link.source, link.line = literal.source, literal.line
        literal.replace_self(link)
        link += literal


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("doctree-read", link_names)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
