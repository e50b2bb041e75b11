"""Link names to where the API pages describe them.

In Markdown, inline code is a link if it is a full name, as ``jaxlora.merge``, with or without a
call behind it. So the pages read the same on GitHub, which knows no roles, and a name that is not
documented is a broken reference, which Sphinx warns of.

Docstrings and annotations name types by the module that defines them, or not by a module at all.
They are found by their last part among the documented names.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

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


def find_by_last_part(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a reference that has no or another module in it, if one documented name fits."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    module, _, last = target.rpartition(".")
    if module and module.partition(".")[0] != "jaxlora":
        return None
    objects = env.domains.python_domain.objects
    documented = [name for name, entry in objects.items() if not entry.aliased]
    found = [name for name in documented if name.rpartition(".")[2] == last]
    found = [name for name in found if f"jaxlora.{last}" == name] or found
    if len(found) != 1:
        return None
    entry = objects[found[0]]
    builder, doc = app.builder, node["refdoc"]
    return make_refnode(builder, doc, entry.docname, entry.node_id, [content], found[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.connect("doctree-read", link_names)
    app.connect("missing-reference", find_by_last_part)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
