"""Replace a directory or file in a program of several processes, and say what went wrong."""

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from jaxlora.storage import directories, processes
from jaxlora.storage.locations import Place
from jaxlora.storage.processes import together

T = TypeVar("T")


def replace(
    call: str,
    target: Path,
    save: Callable[[Path], None],
    check: Callable[[Path], None],
) -> None:
    """Write a directory beside its destination, and put it in its place; all processes together.

    Args:
        call: name of the public function, for errors.
        target: the destination, absolute and without symbolic links.
        save: writes to the directory it is given; every process calls it.
        check: raises if what stands at the destination must not be replaced.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """

    def said(action: Callable[[], T]) -> T:
        return with_path(target, action)

    token = processes.gathered(call, secrets.token_hex(16))[0]
    workspace = directories.Workspace(target, token)

    def enter():
        directories.settled(target, check)
        return workspace.enter()

    lock = together(call, lambda: said(enter), first_alone=True)
    try:
        save(workspace.new)
        together(call, lambda: said(lambda: workspace.swap(check)), first_alone=True)
    except BaseException:
        if jax.process_index() == 0:
            workspace.leave(lock)
        raise
    together(call, lambda: workspace.leave(lock), first_alone=True)


def replace_from_first(
    call: str, target: Path, write: Callable[[Path], None], check: Callable[[Path], None]
) -> None:
    """Replace a directory or a file that the first process writes, see `replace`."""

    def save(place: Path) -> None:
        together(call, lambda: with_path(target, lambda: write(place)), first_alone=True)

    replace(call, target, save, check)


def check_free(place: Path, target: Path, is_own: Callable[[str], bool]) -> None:
    """Raise if a folder holds files that are not of an earlier save.

    Args:
        place: where the folder is.
        target: where the user has it.
        is_own: tells from its name whether a file is of a save.
    """
    if not os.path.lexists(place):
        return
    is_folder = place.is_dir()
    names = [file.name for file in place.iterdir()] if is_folder else ["something else"]
    if others := sorted(name for name in names if not is_folder or not is_own(name)):
        raise FileExistsError(
            f"{target} holds {', '.join(others[:5])}, which would be lost: choose another path"
        )


def with_path(target: Place, action: Callable[[], T]) -> T:
    """Return what an action returns; an error of it names the path, and keeps its number."""
    try:
        return action()
    except Exception as error:
        if isinstance(error, FileExistsError) and error.errno is None:
            raise  # of this library, it names the path
        number = os_number(error)
        text = f"cannot save to {target}: {os.strerror(number) if number else error}; what was "
        text += "saved there before is as it was"
        if number is not None:
            raise OSError(number, text) from error
        kinds = (kind for kind in (OSError, RuntimeError) if isinstance(error, kind))
        raise next(kinds, ValueError)(text) from error


def os_number(error: Exception) -> int | None:
    """Return the number of the operating system for an error, where TensorStore tells it too."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)
