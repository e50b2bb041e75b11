"""What is refused before anything is made, what is replaced, and what a failing disk leaves."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpy.testing import assert_array_equal
from saved import BASE, adapters, names, value_at

import jaxlora
from jaxlora.storage import checkpoints
from jaxlora.weights import fingerprints
from jaxlora.weights.adapters import Replacement

pytestmark = pytest.mark.once

TESTS = Path(__file__).parent.parent


def with_fields(**fields):
    """Return adapters of which one has other fields."""
    found = adapters(1.0)
    return found | {"w": dataclasses.replace(found["w"], **fields)}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({5: adapters(1.0)["w"]}, TypeError, "a path in adapters must be a str: got 5 of type int"),
        ({("w",): adapters(1.0)["w"]}, TypeError, r"must be a str: got \('w',\) of type tuple"),
        ({5: adapters(1.0)["w"], "w": adapters(1.0)["w"]}, TypeError, "must be a str: got 5 of"),
        ({None: adapters(1.0)["w"]}, TypeError, "must be a str: got None of type NoneType"),
        ({}, ValueError, "adapters is empty"),
        ({"w": jnp.ones(3)}, TypeError, r"adapters\['w'\] must be an Adapter: got an array"),
        ([adapters(1.0)["w"]], TypeError, "adapters must be a dict .* got list"),
        (with_fields(a=jnp.full((4, 2), jnp.nan)), ValueError, r"'w' must be finite.*: a hold"),
        (with_fields(b=jnp.full((2, 3), -jnp.inf)), ValueError, r"'w' must be finite.*: b hold"),
        (with_fields(alpha=0.0), ValueError, "alpha of 'w' must be finite and positive: got 0"),
        (with_fields(alpha=float("nan")), ValueError, "alpha of 'w' must be finite and positive"),
        (with_fields(a=jnp.ones((4, 0))), ValueError, "rank of 'w' must be at least 1: got 0"),
        (
            {"e": Replacement(jnp.ones((1, 5)), (2, 5), fingerprints.take(BASE["v"]), (2,))},
            ValueError,
            r"rows of 'e' must be of a leaf of shape \[2, 5\]: got \[2\]",
        ),
    ],
)
def test_what_could_not_be_loaded_is_refused_and_the_earlier_save_stays(
    bad, error, message, tmp_path
):
    jaxlora.save_adapters(tmp_path / "run", adapters(1.0))
    for name in ("run", "new"):
        with pytest.raises(error, match=message):
            jaxlora.save_adapters(tmp_path / name, bad)
    assert (value_at(tmp_path / "run"), names(tmp_path)) == (1.0, ["run"])


@pytest.mark.parametrize("name", ["a.b/c", "w%20", "a b", "ü", "x[0]", "a/../b", ".", ""])
def test_paths_of_any_form_are_saved_and_loaded(name, tmp_path):
    found = {name: adapters(1.0)["w"], "w": adapters(1.0)["w"]}
    jaxlora.save_adapters(tmp_path / "run", found)
    base = {name: BASE["w"], "w": BASE["w"]}
    loaded = jaxlora.load_adapters(tmp_path / "run", base=base)
    jax.tree.map(assert_array_equal, loaded, found)


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    rows: Any = tuple(np.arange(2))
    rows = Replacement(jnp.ones((2, 5)), (2, 5), fingerprints.take(BASE["v"]), rows)
    jaxlora.save_adapters(tmp_path / "run", with_fields(alpha=np.float32(2.5)) | {"v": rows})
    loaded = jaxlora.load_adapters(tmp_path / "run", base=BASE)
    assert (loaded["w"].alpha, loaded["v"].rows) == (2.5, (0, 1))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap])
def test_calls_inside_of_a_transformation_are_refused(transform, tmp_path):
    params = jaxlora.bind(BASE, adapters(1.0))
    jaxlora.save_adapters(tmp_path / "run", adapters(1.0))
    stack = jax.tree.map(lambda x: x[None], (params, adapters(1.0), BASE))
    params, factors, base = stack if transform is jax.vmap else jax.tree.map(lambda x: x[0], stack)
    for call, name, arg in (
        (lambda a: jaxlora.save_adapters(tmp_path / "new", a), "save_adapters", factors),
        (lambda p: jaxlora.save_merged(tmp_path / "new", p), "save_merged", params),
        (lambda b: jaxlora.load_adapters(tmp_path / "run", base=b), "load_adapters", base),
    ):
        with pytest.raises(TypeError, match=rf"{name} is called inside of jax\.jit"):
            transform(call)(arg)
    assert names(tmp_path) == ["run"]


def test_call_under_jit_on_known_arrays_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"save_adapters is called inside of jax\.jit"):
        jax.jit(lambda: jaxlora.save_adapters(tmp_path / "run", adapters(1.0)))()
    assert not names(tmp_path)


def whole_model(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"w": jnp.arange(4.0)})


def merged(path):
    jaxlora.save_merged(path, jaxlora.bind(BASE, adapters(1.0)))


def damaged(path):
    jaxlora.save_adapters(path, adapters(1.0))
    (path / checkpoints.MARK).write_text("{")


def notes(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


KINDS = {
    "model": (whole_model, "a checkpoint of something else"),
    "merged": (merged, "merged weights"),
    "adapters": (lambda path: jaxlora.save_adapters(path, adapters(1.0)), "adapters"),
    "damaged": (damaged, "a checkpoint of something else"),
    "notes": (notes, "something that is no checkpoint"),
    "file": (lambda path: path.write_text("mine"), "something that is no checkpoint"),
    "workspace": (lambda path: (path / "new").mkdir(parents=True), "something that is no"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_saved_by_the_same_function_is_replaced(kind, tmp_path):
    path = tmp_path / "there"
    make, what = KINDS[kind]
    make(path)
    before = {p: p.read_bytes() for p in (path, *path.rglob("*")) if p.is_file()}
    calls = {
        "adapters": lambda: jaxlora.save_adapters(path, adapters(2.0)),
        "merged": lambda: jaxlora.save_merged(path, jaxlora.bind(BASE, adapters(2.0))),
    }
    for name, call in calls.items():
        if name != kind:
            with pytest.raises(FileExistsError, match=rf"there holds {what}"):
                call()
    assert {p: p.read_bytes() for p in (path, *path.rglob("*")) if p.is_file()} == before
    assert names(tmp_path) == ["there"]
    if kind in calls:
        calls[kind]()
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} != before


def test_empty_directory_is_filled(tmp_path):
    (tmp_path / "run").mkdir()
    jaxlora.save_adapters(tmp_path / "run", adapters(1.0))
    assert value_at(tmp_path / "run") == 1.0


def test_save_that_reads_back_otherwise_is_not_kept(tmp_path, monkeypatch):
    jaxlora.save_adapters(tmp_path / "run", adapters(1.0))
    save = checkpoints._save

    def altering(place, tree, about):
        save(place, jax.tree.map(lambda x: x.at[0, 0].set(7), tree), about)

    monkeypatch.setattr(checkpoints, "_save", altering)
    with pytest.raises(ValueError, match=r"cannot save to .*run: what was written is not what"):
        jaxlora.save_adapters(tmp_path / "run", adapters(2.0))
    assert (value_at(tmp_path / "run"), names(tmp_path)) == (1.0, ["run"])


def test_merged_weights_that_read_back_otherwise_are_not_kept(tmp_path, monkeypatch):
    save = checkpoints._save

    def altering(place, tree, about):
        save(place, {"w": tree["w"], "v": tree["v"].astype(jnp.bfloat16)}, about)

    monkeypatch.setattr(checkpoints, "_save", altering)
    with pytest.raises(ValueError, match=r"cannot save to .*run: what was written is not what"):
        jaxlora.save_merged(tmp_path / "run", jaxlora.bind(BASE, adapters(2.0)))
    assert not names(tmp_path)


FAILING = """
import errno, os, pathlib, resource, signal, sys
import conftest, jaxlora, orbax.checkpoint
from saved import adapters, names, value_at

folder = pathlib.Path(sys.argv[1])
path = folder / "run"
jaxlora.save_adapters(path, adapters(1.0))


def check(number):
    try:
        jaxlora.save_adapters(path, adapters(2.0))
    except OSError as error:
        assert error.errno == number, error
        assert f"cannot save to {path}: {os.strerror(number)}; what was" in str(error), error
    else:
        raise AssertionError("it was saved")


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for size in (100, 300, 600):  # bytes that a file may have: it fails at one or another of them
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    check(errno.EFBIG)
    assert value_at(path) == 1.0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
folder.chmod(0o500)
if os.geteuid() == 0:  # whom no mode keeps from writing
    os.seteuid(65534)
check(errno.EACCES)
os.seteuid(os.getuid())
folder.chmod(0o700)
assert value_at(path) == 1.0
jaxlora.save_adapters(path, adapters(3.0))
assert (value_at(path), names(folder)) == (3.0, ["run"])
"""


def test_error_of_the_disk_names_the_path_and_leaves_the_earlier_save(tmp_path):
    pytest.importorskip("resource", reason="limits of file sizes are of POSIX")
    command = [sys.executable, "-c", FAILING, str(tmp_path)]
    done = subprocess.run(command, cwd=TESTS, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]


WRITING = """
import sys
import conftest, jaxlora
from saved import adapters

for value in range(1, 25):
    jaxlora.save_adapters(sys.argv[1], adapters(float(value)))
"""


def test_reader_beside_writers_sees_whole_saves(tmp_path):
    path = tmp_path / "run"
    jaxlora.save_adapters(path, adapters(0.0))
    command = [sys.executable, "-c", WRITING, str(path)]
    writers = [
        subprocess.Popen(command, cwd=TESTS, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    seen = []
    while any(writer.poll() is None for writer in writers):
        seen.append(value_at(path))
    for writer in writers:
        _, errors = writer.communicate()
        assert (writer.returncode, errors) == (0, "")
    assert len(set(seen)) > 1
    assert names(tmp_path) == ["run"]


def test_threads_save_and_load_at_one_path(tmp_path):
    path, errors, seen = tmp_path / "run", [], []
    jaxlora.save_adapters(path, adapters(0.0))

    def work(action):
        try:
            for value in range(1, 6):
                action(float(value))
        except Exception as error:
            errors.append(error)

    actions = [lambda value: jaxlora.save_adapters(path, adapters(value))] * 2
    actions += [lambda _: seen.append(value_at(path))] * 2
    threads = [threading.Thread(target=work, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert value_at(path) == 5.0
    assert names(tmp_path) == ["run"]
