"""Directories that are replaced as a whole, with writers that are slow, killed or quicker."""

import multiprocessing
import os
import secrets
import threading
import time

import pytest

from jaxlora.storage import directories
from jaxlora.storage.directories import Workspace

pytestmark = pytest.mark.once

MARK = "_CHECKPOINT_METADATA"


def anything(path):
    """Let everything be replaced."""


def fill(folder, value):
    """Write a directory of two files that both say a value."""
    folder.mkdir()
    for name in (MARK, "data"):
        (folder / name).write_text(str(value))


def content(folder):
    """Return the value that both files of a directory say."""
    mark, data = (int((folder / name).read_text()) for name in (MARK, "data"))
    if mark != data:
        raise ValueError("of two saves")
    return mark


def save(target, value, *, until="left"):
    """Save a value as far as a stage, and return the workspace and its lock."""
    workspace = Workspace(target, secrets.token_hex(16))
    lock = workspace.enter()
    fill(workspace.new, value)
    if until == "written":
        return workspace, lock
    if until == "between":  # the renames
        target.rename(workspace.old)
        return workspace, lock
    workspace.swap(anything)
    workspace.leave(lock)
    return workspace, None


def die(lock):
    """Give a lock up as a killed process does, with its workspace left."""
    assert lock is not None
    os.close(lock)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_save_takes_the_place_of_the_earlier_one(tmp_path):
    for value in range(3):
        save(tmp_path / "run", value)
        assert content(tmp_path / "run") == value
        assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("write", [fill, lambda path, value: path.write_text(str(value))])
def test_the_disk_has_every_file_before_it_takes_a_place(write, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "it", secrets.token_hex(16))
    lock = workspace.enter()
    write(workspace.new, 1)
    written = (workspace.new, *workspace.new.rglob("*"))
    needed = {path.stat().st_ino for path in written if path.is_file()}
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: synced.add(os.fstat(n).st_ino) or sync(n))
    missing = []
    workspace.swap(lambda place: missing.append(needed - synced))
    workspace.leave(lock)
    assert missing == [set()]


def test_quicker_writer_is_replaced_too(tmp_path):
    target = tmp_path / "run"
    save(target, 1)
    slow, lock = save(target, 2, until="between")
    save(target, 3)
    assert content(target) == 3
    slow.swap(anything)
    slow.leave(lock)
    assert content(target) == 2
    assert names(tmp_path) == ["run"]


def test_writers_that_meet_again_and_again_lose_nothing(tmp_path, monkeypatch):
    """Let another writer be quicker between the renames, three times."""
    target = tmp_path / "run"
    save(target, 0)
    slow, lock = save(target, 1, until="written")
    rename, met = type(target).rename, []

    def late(self, other):
        result = rename(self, other)
        if self == target and other == slow.old and len(met) < 3:
            met.append(True)
            fill(target, 10 + len(met))
        return result

    monkeypatch.setattr(type(target), "rename", late)
    slow.swap(anything)
    assert (content(target), content(slow.old), len(met)) == (1, 13, 3)
    slow.leave(lock)
    assert names(tmp_path) == ["run"]


def test_reader_between_the_renames_finds_what_was_there_last(tmp_path):
    target = tmp_path / "run"
    save(target, 1)
    first, one = save(target, 2, until="between")
    fill(target, 3)
    second, other = save(target, 4, until="between")
    before = {path: path.stat().st_ctime_ns for path in tmp_path.rglob("*")}
    assert directories.settled(target, content) == 3
    assert {path: path.stat().st_ctime_ns for path in tmp_path.rglob("*")} == before
    for workspace, lock in ((first, one), (second, other)):
        workspace.swap(anything)
        workspace.leave(lock)
    assert (content(target), names(tmp_path)) == (4, ["run"])


def test_dead_writer_is_cleared_away_and_a_live_one_is_not(tmp_path):
    target = tmp_path / "run"
    save(target, 1)
    _, dead = save(target, 2, until="written")
    die(dead)
    live, lock = save(target, 3, until="written")
    save(target, 4)
    assert names(tmp_path) == [live.path.name, "run"]
    live.swap(anything)
    live.leave(lock)
    assert (content(target), names(tmp_path)) == (3, ["run"])


def test_dead_writer_between_the_renames_is_needed_until_the_next_save(tmp_path):
    target = tmp_path / "run"
    save(target, 1)
    dead, lock = save(target, 2, until="between")
    die(lock)
    slow, lock = save(target, 3, until="written")
    assert directories.settled(target, content) == 1
    assert dead.old.exists()
    slow.swap(anything)
    slow.leave(lock)
    assert (content(target), names(tmp_path)) == (3, ["run"])


def test_failed_swap_leaves_the_earlier_one(tmp_path, monkeypatch):
    target = tmp_path / "run"
    save(target, 1)
    failing, lock = save(target, 2, until="written")
    rename = type(target).rename

    def fail(self, other):
        if self == failing.new:
            raise OSError("the power is gone")
        return rename(self, other)

    monkeypatch.setattr(type(target), "rename", fail)
    with pytest.raises(OSError, match="the power is gone"):
        failing.swap(anything)
    failing.leave(lock)
    assert (content(target), names(tmp_path)) == (1, ["run"])


def test_what_must_not_be_replaced_stays(tmp_path):
    def refuse(path):
        if path.exists():
            raise FileExistsError("not ours")

    target = tmp_path / "run"
    late, lock = save(target, 1, until="written")
    fill(target, 7)
    with pytest.raises(FileExistsError, match="not ours"):
        late.swap(refuse)
    late.leave(lock)
    assert (content(target), names(tmp_path)) == (7, ["run"])


@pytest.mark.parametrize(
    "name",
    [
        ".run.new",
        ".run.old",
        ".run.jaxlora",
        f".run.jaxlora-{'a' * 31}",
        f".run.jaxlora-{'A' * 32}",
        f".run.jaxlora-{'a' * 32}.bak",
        f".runs.jaxlora-{'a' * 32}",
        f"run.jaxlora-{'a' * 32}",
        f".other.jaxlora-{'a' * 32}",
    ],
)
def test_neighbours_stay(name, tmp_path):
    (tmp_path / name / "old").mkdir(parents=True)
    (tmp_path / name / "notes.txt").write_text("mine")
    target = tmp_path / "run"
    with pytest.raises(FileNotFoundError):
        directories.settled(target, content)
    save(target, 1)
    save(target, 2)
    assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == sorted([name, "run"])


def test_link_with_the_name_of_a_workspace_is_not_followed(tmp_path):
    fill(tmp_path / "mine", 1)
    (tmp_path / f".run.jaxlora-{'a' * 32}").symlink_to(tmp_path / "mine")
    save(tmp_path / "run", 2)
    assert content(tmp_path / "mine") == 1


@pytest.mark.parametrize("name", ["a b", "ü", "run[0]", "run.*", ".hidden", "$HOME"])
def test_names_of_any_form_are_matched_as_they_are(name, tmp_path):
    _, lock = save(tmp_path / name, 1, until="written")
    die(lock)
    save(tmp_path / name, 2)
    assert (content(tmp_path / name), names(tmp_path)) == (2, [name])


def test_what_stays_the_same_and_fails_is_raised_at_once(tmp_path):
    fill(tmp_path / "run", 1)
    (tmp_path / "run" / "data").write_text("2")
    start = time.monotonic()
    with pytest.raises(ValueError, match="of two saves"):
        directories.settled(tmp_path / "run", content)
    assert time.monotonic() - start < 1


def test_reader_gives_up_on_what_never_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "_ATTEMPTS", 3)
    target = tmp_path / "run"

    def replaced(place):
        save(target, len(calls))
        calls.append(place)
        raise ValueError("of two saves")

    calls = []
    with pytest.raises(TimeoutError, match=r"run is replaced faster than it can be read"):
        directories.settled(target, replaced)
    assert calls == [target] * 3


def test_without_locks_nothing_of_others_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(directories, "fcntl", None)
    left, lock = save(tmp_path / "run", 1, until="written")
    assert lock is None
    save(tmp_path / "run", 2)
    assert names(tmp_path) == [left.path.name, "run"]


def _write_until(target, end, index):
    """Save to a path as often as there is time for."""
    count = 0
    while time.time() < end:
        save(target, 100 * count + index)
        count += 1


def test_threads_and_processes_at_one_path_lose_nothing(tmp_path):
    target = tmp_path / "run"
    save(target, 0)
    end = time.time() + 2
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_write_until, args=(target, end, 1))
    threads = [threading.Thread(target=_write_until, args=(target, end, i)) for i in (2, 3)]
    for worker in (process, *threads):
        worker.start()
    seen = []
    while time.time() < end:
        seen.append(directories.settled(target, content))
    for worker in (process, *threads):
        worker.join()
    assert process.exitcode == 0
    assert len(set(seen)) > 2
    save(target, 5)
    assert (content(target), names(tmp_path)) == (5, ["run"])
