"""What the path of a checkpoint means, and which paths are refused before anything is made."""

import importlib.util
import os
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.storage import locations
from jaxlora.weights import fingerprints
from jaxlora.weights.adapters import Adapter
from jaxlora.weights.roles import Roles

pytestmark = pytest.mark.once

BASE = {"w": jnp.zeros((4, 3))}


def adapters(value):
    """Return adapters of which every element is a value."""
    factors = jnp.full((4, 1), value), jnp.full((1, 3), value)
    roles, fingerprint = Roles((), (0,), (1,)), fingerprints.take(BASE["w"])
    return {"w": Adapter(*factors, roles, 1.0, (4, 3), fingerprint)}


def value_at(path):
    """Return the value of adapters that were saved, after checking that all elements have it."""
    a, b = (getattr(jaxlora.load_adapters(path, base=BASE)["w"], field) for field in "ab")
    assert_array_equal(a, a[0, 0])
    assert_array_equal(b, a[0, 0])
    return float(a[0, 0])


def test_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    jaxlora.save_adapters(tmp_path / "v1", adapters(1.0))
    (tmp_path / "latest").symlink_to("v1")
    for value in (2.0, 3.0):
        jaxlora.save_adapters(tmp_path / "latest", adapters(value))
        assert (value_at(tmp_path / "latest"), value_at(tmp_path / "v1")) == (value, value)
    assert os.readlink(tmp_path / "latest") == "v1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "v1"]


def test_link_to_nothing_means_what_it_points_to(tmp_path):
    (tmp_path / "scratch").symlink_to(tmp_path / "disk" / "run")
    jaxlora.save_adapters(tmp_path / "scratch", adapters(1.0))
    assert value_at(tmp_path / "disk" / "run") == 1.0
    assert (tmp_path / "scratch").is_symlink()


@pytest.mark.parametrize("kind", [str, Path, epath.Path])
def test_tilde_is_the_home_directory(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    jaxlora.save_adapters(kind("~/run"), adapters(1.0))
    assert value_at(tmp_path / "home" / "run") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_relative_path_is_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxlora.save_adapters("runs/one", adapters(1.0))
    assert value_at(tmp_path / "runs" / "one") == value_at("runs/../runs/one") == 1.0


@pytest.mark.parametrize("name", ["a b", "ü%20", "what?", "run#1", "run[0]", "x:y", "$HOME", "a'b"])
def test_names_of_any_form_are_saved_and_loaded(name, tmp_path):
    for value in (1.0, 2.0):
        jaxlora.save_adapters(tmp_path / name, adapters(value))
    assert value_at(tmp_path / name) == 2.0
    jaxlora.save_merged(tmp_path / "m" / name / "run", jaxlora.bind(BASE, adapters(1.0)))
    for path in (tmp_path / name, tmp_path / "m" / name / "run"):
        with ocp.StandardCheckpointer() as checkpointer:
            assert set(checkpointer.restore(path)) == {"w"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "m"])


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("s3://bucket/x", ValueError, r"'s3://bucket/x' is in no place .* got s3://"),
        ("file:///tmp/x", ValueError, r"'file:///tmp/x' is in no place .* got file://"),
        (Path("gs://bucket/x"), ValueError, r"one slash too few.* as a string, gs://bucket/x"),
        ("gs://bucket", ValueError, r"'gs://bucket' is a whole bucket"),
        ("", ValueError, "path is empty"),
        ("~nobody-of-this-name/x", ValueError, "'~nobody-of-this-name/x' is in the home directory"),
        (b"x", TypeError, r"path must be a str or an os.PathLike of one: got b'x'"),
        (5, TypeError, r"path must be a str or an os.PathLike of one: got 5"),
        (None, TypeError, r"path must be a str or an os.PathLike of one: got None"),
    ],
)
def test_what_is_no_place_for_a_checkpoint_is_refused(path, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: jaxlora.save_adapters(path, adapters(1.0)),
        lambda: jaxlora.save_merged(path, jaxlora.bind(BASE, adapters(1.0))),
        lambda: jaxlora.load_adapters(path, base=BASE),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [str, epath.Path])
def test_bucket_without_what_reaches_it_is_refused(kind, tmp_path, monkeypatch):
    if any(importlib.util.find_spec(name) for name in ("gcsfs", "tensorflow")):
        pytest.skip("what reaches a bucket is installed")
    monkeypatch.chdir(tmp_path)
    path = kind("gs://bucket/run")
    with pytest.raises(ImportError, match=r"gs://bucket/run is in a bucket.* pip install gcsfs"):
        jaxlora.save_adapters(path, adapters(1.0))
    with pytest.raises(ImportError, match=r"gs://bucket/run is in a bucket.* pip install gcsfs"):
        jaxlora.load_adapters(path, base=BASE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda _: False, FileNotFoundError, r"gs://bucket/run .* there is no bucket gs://bucket"),
        (lambda _: 1 / 0, OSError, r"gs://bucket/run cannot be reached: division by zero"),
        (lambda _: __import__("time").sleep(5), TimeoutError, "gs://bucket/run does not answer"),
    ],
)
def test_bucket_that_cannot_be_had_is_refused(answer, error, message, monkeypatch):
    monkeypatch.setattr(locations, "_PATIENCE", 0.2)
    monkeypatch.setattr(type(epath.Path("gs://bucket")), "exists", answer)
    with pytest.raises(error, match=message):
        locations.resolve("gs://bucket/run")
