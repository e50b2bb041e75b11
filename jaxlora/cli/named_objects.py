"""Objects of the user's own code, named on the command line as ``module:object``."""

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from jaxlora.formats import Names
from jaxlora.messages import checks
from jaxlora.targets.sites import Sites, find_sites
from jaxlora.types import Leaf


def load(text: str) -> Leaf:
    """Return an object from its name.

    Args:
        text: ``package.module:object``, of a module that can be imported here, or
            ``path/to/file.py:object``.

    Raises:
        ValueError: it is no such name, or there is no such module or object.
    """
    where, colon, name = text.rpartition(":")
    if not (colon and where and name):
        raise ValueError(f"module:object or file.py:object is needed: got {text!r}")
    find = _from_file if where.endswith(".py") else _imported
    module = _called(find, where, name=where)
    if not hasattr(module, name):
        raise ValueError(f"{where!r} has no {name!r}: module:object is needed: got {text!r}")
    return getattr(module, name)


def names(text: str) -> Names:
    """Return the `jaxlora.formats.Names` of a name."""
    found = load(text)
    if not isinstance(found, Names):
        raise ValueError(f"{text!r} must be a jaxlora.formats.Names: got {checks.shown(found)}")
    return found


def sites(text: str) -> Sites:
    """Return where adapters can go in a model, see `model`."""
    return find_sites(*model(text))


def model(text: str) -> tuple[Leaf, ...]:
    """Return ``(fn, params, *args)`` of a model, what `jaxlora.find_sites` takes.

    Args:
        text: names a function without arguments that returns it; parameters may be shapes.
    """
    make = load(text)
    found = _called(make, name=text) if callable(make) else None
    if not isinstance(found, tuple) or len(found) < 2:
        raise ValueError(
            f"{text!r} must be a function without arguments that returns (fn, params, *args): "
            f"got {checks.shown(make)}"
        )
    return found


def _called(function: Callable[..., Leaf], *args: str, name: str) -> Leaf:
    """Return what a function of the user's code returns, or raise in one line what it raises."""
    try:
        return function(*args)
    except Exception as error:
        raise ValueError(f"{name!r} cannot be used: {type(error).__name__}: {error}") from error


def _imported(name: str) -> Leaf:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(name)


def _from_file(name: str) -> Leaf:
    """Return what a file defines, which imports what lies beside it, as where Python runs it."""
    path = Path(name).expanduser()
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
    assert spec is not None  # there is a loader
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    sys.modules.setdefault(path.stem, module)  # where Flax looks the types of its fields up
    loader.exec_module(module)
    return module
