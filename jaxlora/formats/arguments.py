"""Checks of the arguments that all readers and writers of files take."""

from pathlib import Path

from jaxlora.formats.names import Names
from jaxlora.messages import checks
from jaxlora.storage import locations
from jaxlora.targets.sites import Sites


def check_names(names: object) -> None:
    """Raise if these are no names."""
    if not isinstance(names, Names):
        raise TypeError(f"names must be a jaxlora.formats.Names: got {checks.shown(names)}")


def check_sites(sites: object, *, may_be_none: bool = False) -> None:
    """Raise if these are no sites."""
    if not isinstance(sites, Sites) and not (may_be_none and sites is None):
        or_none = ", or None" if may_be_none else ""
        raise TypeError(
            f"sites must be from jaxlora.find_sites{or_none}: got {checks.shown(sites)}"
        )


def local(path: locations.PathLike) -> Path:
    """Return a path of this machine, or raise for one in a bucket."""
    found = locations.resolve(path)
    if not locations.is_local(found):
        raise ValueError(f"the path must be a local one: got {str(found)!r}")
    return found
