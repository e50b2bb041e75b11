"""Files that are written a tensor at a time are those of the library of safetensors."""

import errno
import functools
import hashlib
import os
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from jaxlora.formats import streaming, tensors


def at_once(make):
    """Return what yields each tensor in one piece."""
    return lambda name: [functools.partial(np.asarray, make(name))]


def specs(arrays):
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}


@given(data=st.data())
@settings(deadline=None, max_examples=30)
@jax.enable_x64(True)
def test_what_is_written_is_what_the_library_writes(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("streaming") / "it.safetensors"
    names = data.draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=6))
    names = [name for name in names if name != "__metadata__"]
    rng, arrays = np.random.default_rng(0), {}
    for name in names:
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = jnp.dtype(data.draw(st.sampled_from([*tensors.DTYPES])))
        arrays[name] = np.asarray(rng.standard_normal(shape) * 3).astype(dtype)
    streaming.write(path, specs(arrays), at_once(arrays.__getitem__))
    with tensors.opened(path) as file:
        assert file.shapes == {name: x.shape for name, x in arrays.items()}
        assert file.metadata == {"format": "pt"}
        for name, x in arrays.items():
            assert file[name].dtype == x.dtype
            assert file[name].tobytes() == x.tobytes()
    assert path.read_bytes() == save(arrays, metadata={"format": "pt"})


def test_a_dtype_that_files_do_not_name_is_refused(tmp_path):
    arrays = {"w": np.zeros(4, jnp.int4)}
    with pytest.raises(ValueError, match=r"'w' must have a dtype that files .* name, .* got int4"):
        streaming.write(tmp_path / "it", specs(arrays), at_once(arrays.__getitem__))


def test_two_tensors_are_in_memory_at_once(tmp_path):
    shapes = {f"w{i}": jax.ShapeDtypeStruct((1024, 1024), np.float32) for i in range(8)}
    tracemalloc.start()
    streaming.write(tmp_path / "it", shapes, at_once(lambda _: np.ones((1024, 1024), np.float32)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2**22


def test_what_fails_to_be_made_is_raised(tmp_path):
    shapes = {f"w{i}": jax.ShapeDtypeStruct((3,), np.float32) for i in range(3)}

    def make(name):
        if name == "w1":
            raise ValueError("the weight is not finite")
        return np.ones(3, np.float32)

    with pytest.raises(ValueError, match="the weight is not finite"):
        streaming.write(tmp_path / "it", shapes, at_once(make))


def test_a_digest_is_of_all_behind_the_header():
    arrays = {"b": np.arange(6.0).reshape(2, 3).T, "a": np.ones(3, np.float16)}
    arrays["c"] = np.arange(2, dtype=">f4")
    file = save({name: np.ascontiguousarray(x) for name, x in arrays.items()})
    data = file[8 + int.from_bytes(file[:8], "little") :]
    assert streaming.digest(arrays) == hashlib.sha256(data).hexdigest()


def test_the_disk_has_all_at_the_end(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "it", [], os.fsync

    def recorded(descriptor):
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", recorded)
    shapes = {f"w{i}": jax.ShapeDtypeStruct((3,), np.float32) for i in range(5)}
    streaming.write(path, shapes, at_once(lambda _: np.ones(3, np.float32)))
    assert synced[-1] == path.stat().st_size


@pytest.mark.parametrize("count", [1, 5])
def test_what_the_disk_refuses_is_raised(count, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    shapes = {f"w{i}": jax.ShapeDtypeStruct((3,), np.float32) for i in range(count)}
    with pytest.raises(OSError, match="No space left"):
        streaming.write(tmp_path / "it", shapes, at_once(lambda _: np.ones(3, np.float32)))
