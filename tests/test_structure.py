"""The bounds of the code: which folder may import which, what is kept, how large things get."""

import ast
import importlib
import inspect
import re
from collections.abc import MutableMapping, MutableSequence, MutableSet
from pathlib import Path

import pytest

import jaxlora

pytestmark = pytest.mark.once

FOLDER = Path(jaxlora.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))

# from the bottom up: a module imports from its own line and from the lines before
ORDER = (
    ("jaxlora.version", "jaxlora.types", "jaxlora.messages"),
    ("jaxlora.weights",),
    ("jaxlora.linalg",),
    ("jaxlora.tracing.jaxprs.compat",),
    ("jaxlora.tracing.registry",),
    ("jaxlora.tracing.jaxprs",),
    ("jaxlora.tracing.values",),
    ("jaxlora.tracing",),
    ("jaxlora.tracing.products",),
    ("jaxlora.tracing.rules",),
    ("jaxlora.tracing.transform",),
    ("jaxlora.initializers",),
    ("jaxlora.targets",),
    ("jaxlora.trees",),
    (
        "jaxlora.algebra",
        "jaxlora.calibration",
        "jaxlora.optim",
        "jaxlora.reports",
        "jaxlora.storage",
    ),
    ("jaxlora.analysis", "jaxlora.formats", "jaxlora.planning"),
    ("jaxlora.nnx",),
    ("jaxlora",),
    ("jaxlora.cli",),
    ("jaxlora.__main__",),
)


def module_of(file):
    parts = file.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports_of(file):
    """Yield the modules of this library that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


GRAPH = {module: set(imports_of(file)) - {module} for module, file in MODULES.items()}


def level(module):
    """Return the line of the order that a module is on: that of the longest name that fits."""
    lines = {name: i for i, names in enumerate(ORDER) for name in names}
    fitting = [name for name in lines if f"{module}.".startswith(f"{name}.")]
    return lines[max(fitting, key=len)]


def test_no_import_runs_up():
    up = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if level(other) > level(module)
    ]
    assert not up, up


def test_no_import_runs_in_a_circle():
    left = dict(GRAPH)
    while leaves := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in leaves}
    assert not left, {module: sorted(others & left.keys()) for module, others in left.items()}


def test_no_function_hides_a_module():
    loaded = {name: importlib.import_module(name) for name in MODULES}
    inner = [name.rpartition(".") for name in MODULES if "." in name]
    hidden = [
        f"{package}.{name}"
        for package, _, name in inner
        if not inspect.ismodule(getattr(loaded[package], name))
    ]
    assert not hidden, hidden


def test_root_has_few_names():
    assert len(jaxlora.__all__) <= 36


# filled while the modules of rules are imported, and read afterwards
REGISTRY = {"jaxlora.tracing.registry._TABLE"}


def test_nothing_at_module_level_can_be_changed_but_the_registry():
    kept = {
        f"{module}.{name}": value
        for module in MODULES
        for name, value in vars(importlib.import_module(module)).items()
        if not name.startswith("__")
    }
    changeable = MutableMapping | MutableSequence | MutableSet
    found = {name for name, value in kept.items() if isinstance(value, changeable)}
    assert found == REGISTRY


SOURCES = [
    file
    for folder in ("jaxlora", "tests", "examples", "benchmarks")
    for file in sorted((FOLDER.parent / folder).rglob("*.py"))
]


def test_no_file_is_long():
    lengths = {file: len(file.read_text().splitlines()) for file in SOURCES}
    long = {str(file): length for file, length in lengths.items() if length > 300}
    assert not long, long


def test_few_types_are_any():
    words = [word for file in FILES for word in re.findall(r"\bAny\b", file.read_text())]
    assert len(words) <= 200
