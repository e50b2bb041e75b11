"""Checks of the arguments that all readers and writers of files take."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from jaxlora.formats.names.mapping import Names
from jaxlora.messages import checks
from jaxlora.storage import directories, locations
from jaxlora.targets.sites import check_sites
from jaxlora.weights import tree_checks
from jaxlora.weights.adapters import Adapters

T = TypeVar("T")


def check_names(names: object) -> None:
    """Raise if these are no names."""
    if not isinstance(names, Names):
        raise TypeError(f"names must be a jaxlora.formats.Names: got {checks.shown(names)}")


def check_saved(call: str, adapters: Adapters, names: object, sites: object) -> None:
    """Raise if adapters cannot be saved, or what tells their names is none."""
    tree_checks.check_adapters(adapters, some=True)
    tree_checks.check_untraced(call, dict(adapters))
    check_names(names)
    check_sites(sites, may_be_none=True)


def local(path: locations.PathLike) -> Path:
    """Return a path of this machine, or raise for one in a bucket."""
    found = locations.resolve(path)
    if not locations.is_local(found):
        raise ValueError(f"the path must be a local one: got {str(found)!r}")
    return found


def read(path: locations.PathLike, reader: Callable[[Path], T], mark: str) -> T:
    """Return what a function reads at a path of this machine, of one save where several are made.

    Args:
        path: as the user gave it.
        reader: takes where it stands.
        mark: name of a file that differs between any two folders.

    Raises:
        TimeoutError: it is replaced faster than it can be read.
    """
    return directories.settled(_to_read(path), reader, mark=mark, alone=True)


def standing(path: locations.PathLike) -> Path:
    """Return where what is to be read at a path of this machine stands."""
    return directories.standing(_to_read(path))


def _to_read(path: locations.PathLike) -> Path:
    """Return a path of this machine; a link to a file stays one, for an index has files beside."""
    target = local(path)
    return Path(os.path.abspath(os.path.expanduser(path))) if target.is_file() else target


def expressions(ignore: Sequence[str]) -> list[re.Pattern[str]]:
    """Return regular expressions, or raise for what is none."""
    needed = "ignore must be regular expressions for names, as ('.*inv_freq',)"
    if isinstance(ignore, str) or not checks.is_listing(ignore):
        raise TypeError(f"{needed}: got {checks.shown(ignore)}")
    for expression in ignore:
        if not isinstance(expression, str):
            raise TypeError(f"{needed}: got {checks.shown(expression)} among them")
    try:
        return [re.compile(expression) for expression in ignore]
    except re.error as error:
        raise ValueError(f"{needed}: {error}: got {[*ignore]}") from error


def is_among(name: str, among: Sequence[re.Pattern[str]]) -> bool:
    """Tell whether a whole name is what one of some regular expressions means."""
    return any(expression.fullmatch(name) for expression in among)
