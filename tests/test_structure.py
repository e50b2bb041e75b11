"""The bounds of the code: which folder may import which, and how large things get."""

import ast
from pathlib import Path

import jaxlora

FOLDER = Path(jaxlora.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))

# from the bottom up: a module imports from its own line and from the lines before
ORDER = (
    ("jaxlora.version", "jaxlora.messages"),
    ("jaxlora.weights",),
    ("jaxlora.linalg",),
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
    ("jaxlora.nnx",),
    ("jaxlora",),
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
