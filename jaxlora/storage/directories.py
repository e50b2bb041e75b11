"""Replace a directory as a whole, beside other writers and readers, and lose none on the way.

A file is replaced so too, but by one renaming, for a file can be renamed onto another.

What a writer has that is not at its destination yet, or no longer, is in one directory beside
it: its workspace, ``.{name}.jaxlora-{32 hex digits}``, with a name that is its own. In ``new``
the directory is written. When the disk has all of its files, what stands at the destination is
moved to ``old``, ``new`` takes its place, and the workspace is removed. A directory cannot be
renamed onto another that is not empty, so a writer notices one that was quicker, and moves its
work aside too: the last wins.

A writer that is killed leaves its workspace. Each holds a lock on its own for as long as it
lives, so later writers remove those, and only those, that they can lock. Between the two
renames the destination is missing: a reader finds what was there last in ``old``. Readers write
nothing. One whose directory is replaced while it reads repeats it.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # on Windows, where workspaces of killed writers stay
    fcntl = None

T = TypeVar("T")
Identity = tuple[int, int, bytes] | None
_ATTEMPTS = 200  # of a reader, at most 0.1 s apart
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The directory beside a destination in which one writer works.

    Attributes:
        target: the destination, absolute and without symbolic links.
        token: 32 hex digits, which no other writer has.
    """

    target: Path
    token: str

    @property
    def path(self) -> Path:
        """The directory itself."""
        return self.target.with_name(f".{self.target.name}.jaxlora-{self.token}")

    @property
    def new(self) -> Path:
        """What is to take the destination's place."""
        return self.path / "new"

    @property
    def old(self) -> Path:
        """What was at the destination last."""
        return self.path / "old"

    def enter(self) -> int | None:
        """Make the directory and return a lock on it, None where there are no locks."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.target)
        while True:
            self.path.mkdir()
            lock = _lock(self.path, wait=True)
            if self.path.exists() and (lock is None or _is_at(lock, self.path)):
                return lock
            if lock is not None:  # another writer took it for abandoned before it was locked
                os.close(lock)

    def swap(self, check: Callable[[Path], None]) -> None:
        """Put ``new`` in the destination's place.

        Args:
            check: raises if what it is given must not be replaced.
        """
        _sync(self.new)
        for count in itertools.count():
            settled(self.target, check)
            try:
                if self.new.is_file():
                    self.new.replace(self.target)
                    return
                if self.target.exists():
                    if self.old.exists():  # from the last round; what is in `old` is the latest
                        self.old.rename(self.path / f"older_{count}")
                    self.target.rename(self.old)
                self.new.rename(self.target)
                return
            except FileNotFoundError:
                if not self.new.exists():
                    raise
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise

    def leave(self, lock: int | None) -> None:
        """Remove the directory, but not what was moved away from a destination that is missing."""
        if not self.target.exists() and self.old.exists():
            with contextlib.suppress(OSError):
                self.old.rename(self.target)
        if self.target.exists() or not self.old.exists():
            _remove(self.path)
        if self.target.exists():
            remove_abandoned(self.target)
        if lock is not None:
            os.close(lock)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or all files of a directory."""
    for file in (path, *path.rglob("*")):
        if file.is_file():
            descriptor = os.open(file, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def remove_abandoned(target: Path) -> None:
    """Remove the workspaces of writers that are dead, but not what they moved away and is needed.

    Args:
        target: the destination beside which they are.
    """
    for workspace in _workspaces(target):
        lock = _lock(workspace.path)
        if lock is None:
            continue
        if target.exists() or not workspace.old.exists():
            _remove(workspace.path)
        os.close(lock)


def standing(target: Path) -> Path:
    """Return where the directory of a destination is, also between the renames of a writer."""
    if target.exists():
        return target
    moved = []
    for workspace in _workspaces(target):
        with contextlib.suppress(OSError):
            moved.append((workspace.old.stat().st_ctime_ns, workspace.old))
    return max(moved)[1] if moved else target


def settled(
    target: Path,
    read: Callable[[Path], T],
    *,
    mark: str = "_CHECKPOINT_METADATA",
    agree: Callable[[bool], bool] = bool,
    alone: bool = False,
) -> T:
    """Return what a function reads at a destination, repeated while that is being replaced.

    Args:
        target: the destination.
        read: takes the path where the directory is; what it raises is raised only if the
            destination was the same before and after.
        mark: name of a file that differs between any two directories.
        agree: makes one decision of those of several processes, true if it is in any.
        alone: nothing in the directory tells that it is of one save: it has to be the same also
            where nothing was raised.

    Raises:
        TimeoutError: it is replaced faster than it can be read.
    """

    def is_other(place, before):
        now = standing(target)
        return (place, before) != (now, _identity(now, mark))

    last: Exception | None = None
    for attempt in range(_ATTEMPTS):
        place = standing(target)
        before = _identity(place, mark)
        try:
            found = read(place)
        except (OSError, ValueError) as error:
            time.sleep(min(0.01 * (attempt + 1), 0.1))
            if not agree(is_other(place, before)):
                raise
            last = error
        else:
            if not (alone and is_other(place, before)):
                return found
    raise TimeoutError(f"{target} is replaced faster than it can be read") from last


def _identity(path: Path, mark: str) -> Identity:
    """Return what tells a directory from any other that has been or will be at its path."""
    try:
        found = path.stat()
    except OSError:
        return None
    try:
        content = (path / mark).read_bytes()
    except OSError:
        content = b""
    return found.st_dev, found.st_ino, content


def _workspaces(target: Path) -> Iterator[Workspace]:
    """Yield the workspaces beside a destination: directories whose names match exactly."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.jaxlora-([0-9a-f]{{32}})")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return
    for name in names:
        if (found := pattern.fullmatch(name)) and not (target.parent / name).is_symlink():
            yield Workspace(target, found[1])


def _lock(path: Path, *, wait: bool = False) -> int | None:
    """Return a descriptor that holds the lock of a directory, None if it cannot be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    """Remove a directory, into which threads of a save that failed may be writing still."""
    for pause in (0.0, 0.01, 0.1, 0.5):
        time.sleep(pause)
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return


def _is_at(descriptor: int, path: Path) -> bool:
    """Tell whether a path still leads to a directory that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
