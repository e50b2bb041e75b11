"""What is said of a public name that is not there: where it is, or what is near."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

_RENAMED: Mapping[str, str] = MappingProxyType(
    {"to_plain": "algebra.rebase", "Quantization": "QuantizationConfig"}
)


def public(namespace: Mapping[str, Any]) -> Iterator[str]:
    """Yield the public names of a package, and those of the namespaces in it as ``optim.freeze``.

    Args:
        namespace: the globals of the package. What it imports where it is first used is left out.
    """
    yield from namespace["__all__"]
    for name in namespace["__all__"]:
        value = namespace.get(name)
        if isinstance(value, ModuleType):
            yield from (f"{name}.{inner}" for inner in value.__all__)


def no_attribute(module: str, name: str, known: Iterable[str]) -> str:
    """Return the message of an error: a module has no such name.

    >>> no_attribute("m", "scale", ["bind", "algebra.scale"])
    "module 'm' has no attribute 'scale': use m.algebra.scale"
    >>> no_attribute("m", "bnid", ["bind", "algebra.scale"])
    "module 'm' has no attribute 'bnid': nearest: m.bind"
    """
    missing = f"module {module!r} has no attribute {name!r}"
    by_name: dict[str, str] = {}
    for found in known:  # those of the package itself come first
        by_name.setdefault(found.rpartition(".")[2], found)
    if found := _RENAMED.get(name) or by_name.get(name):
        return f"{missing}: use {module}.{found}"
    near = difflib.get_close_matches(name, by_name, n=1)
    return f"{missing}: nearest: {module}.{by_name[near[0]]}" if near else missing
