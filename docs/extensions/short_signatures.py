"""Signatures and types as a reader writes them, without the modules that define them."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.domains.python import PyClasslike

MODULES = re.compile(r"\b(?:collections\.abc|jaxlora(?:\.[a-z_]\w*)+)\.(?=[A-Z])")
ARRAY = re.compile(r"[\w.]*\._jax\.Array")  # where JAX defines it


def shorten_signature(
    app: Sphinx,
    what: str,
    name: str,
    described: Any,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """Write defaults of a signature as code, and that of a class whose metaclass hides it."""
    if what == "class" and signature == "(*args, **kwargs)":
        parameters = [*inspect.signature(described.__init__).parameters.values()][1:]
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        signature = str(inspect.Signature(plain))
    if signature:
        signature = signature.replace("<class 'jax.numpy.float32'>", "float32")
        for made in _factories(described):
            signature = signature.replace("<factory>", made, 1)
    return signature, returned


def _factories(described: Any) -> Iterator[str]:
    """Yield the defaults that the fields of a dataclass make, in order, as code."""
    fields = dataclasses.fields(described) if dataclasses.is_dataclass(described) else ()
    for field in fields:
        if field.default_factory is not dataclasses.MISSING:
            name = getattr(field.default_factory, "__name__", "...")
            yield "{}" if name == "dict" else f"{name}()"


def shorten_types(
    app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]
) -> None:
    """Leave the modules out of the types of attributes, which napoleon writes in full."""
    for number, line in enumerate(lines):
        if line.startswith(":vartype"):
            lines[number] = ARRAY.sub("jax.Array", MODULES.sub("", line))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension, and call attributes so."""
    for field in PyClasslike.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", shorten_types, priority=900)  # after napoleon
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
