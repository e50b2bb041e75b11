"""Match names and regular expressions against paths of leaves.

A name is a run of whole path parts: ``"query"``, ``"mlp/up"``. A regular expression has to match
whole paths. Layers are numbers in paths.
"""

import re
from collections.abc import Iterable, Sequence

from jaxlora.targets.config import ALL_LINEAR, Targets
from jaxlora.weights import blocks


def contains(path: str, name: str) -> bool:
    """Tell whether a name is a run of whole parts of a path."""
    return f"/{name.strip('/')}/" in f"/{path}/"


def ends_in(path: str, name: str) -> bool:
    """Tell whether a name, perhaps of a part, names the leaf at a path, not what holds it."""
    return any(f"/{path}".endswith(f"/{n.strip('/')}") for n in (name, blocks.parse(name)[0]))


def matches(targets: Targets, candidates: Iterable[str]) -> dict[str, list[str]]:
    """Return for each target the paths it matches, in order; a regular expression is one target."""
    candidates = list(candidates)
    if isinstance(targets, str):
        return {targets: [path for path in candidates if re.fullmatch(targets, path)]}
    found = {name: [path for path in candidates if contains(path, name)] for name in targets}
    for name in (name for name, paths_of in found.items() if not paths_of):  # perhaps of a part
        found[name] = [path for path in candidates if contains(path, blocks.parse(name)[0])]
    return found


def hint(name: str, *, is_expression: bool) -> str:
    """Return what to do about a target that matches nothing, if its form tells.

    >>> hint("query", is_expression=True)
    '; one string is a regular expression for whole paths: for a name write ("query",)'
    >>> hint("block_*", is_expression=False)
    '; a name is a run of whole path parts: for one regular expression write ".*block_.*"'
    >>> hint("params.query", is_expression=False)
    "; the parts of a path are joined by '/': write ('params/query',)"
    """
    text = blocks.parse(name)[0]
    is_glob = bool(re.search(r"(?<!\\.)(?<![.)\]\\])[*?]", name))
    if is_expression and is_glob:
        return f'; it is a regular expression, in which any text is .*: write "{_from_glob(name)}"'
    if is_expression and re.fullmatch(r"[\w/.-]+", name):
        return f'; one string is a regular expression for whole paths: for a name write ("{name}",)'
    if not is_expression and re.search(r"[*?|()^$\\+]", text):
        written = _from_glob(name) if is_glob else name
        return (
            f'; a name is a run of whole path parts: for one regular expression write "{written}"'
        )
    if not is_expression and re.fullmatch(r"\w+(\.\w+)+", text):
        return f"; the parts of a path are joined by '/': write {(text.replace('.', '/'),)}"
    return ""


def _from_glob(name: str) -> str:
    """Return the regular expression for whole paths that a glob for a part of one means."""
    return ".*" + name.replace("?", ".").replace("*", ".*").removeprefix(".*")


def matched(targets: Targets, candidates: Iterable[str]) -> set[str]:
    """Return the paths that one of the targets matches; no targets match none."""
    return {path for found in matches(targets or (), candidates).values() for path in found}


def without_all(targets: Targets) -> tuple[bool, Targets]:
    """Return whether ``"all-linear"`` is among the targets, and the others.

    >>> without_all("all-linear"), without_all(("all-linear", "embed")), without_all("embed")
    ((True, ()), (True, ('embed',)), (False, 'embed'))
    """
    if isinstance(targets, str):
        return (True, ()) if targets == ALL_LINEAR else (False, targets)
    return ALL_LINEAR in targets, tuple(name for name in targets if name != ALL_LINEAR)


def means(key: str, path: str, part: blocks.Part | None, shape: Sequence[int]) -> bool:
    """Tell whether a key of a pattern is a name, or the expression, of a path or of a part."""
    if blocks.is_part(key):
        name, text = blocks.parse(key)
        return contains(path, name) and blocks.resolve(text, shape) == part
    return contains(path, key) or bool(re.fullmatch(key, path))


def layer(path: str) -> int | None:
    """Return the first number that ends a part of a path, None where there is none.

    >>> layer("params/block_3/dense_1/kernel"), layer("params/blocks/kernel")
    (3, None)
    """
    found = re.search(r"(?:^|/)(?:[^/]*[^/0-9])?([0-9]+)(?=/|$)", path)
    return int(found[1]) if found else None


def is_in_layers(path: str, stack: Sequence[int], layers: Sequence[int]) -> bool:
    """Tell whether a leaf is in one of the layers, by its number or as a stack of layers."""
    number = layer(path)
    return bool(stack) if number is None else number in layers
