"""Arrays that two threads put are as those that `jax.device_put` puts; also on eight devices."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxlora.formats import placing

ROWS = 2**21  # so that all are large enough for two threads, those of a byte too


def arrays(dtype):
    """Return rows that lie as they would in a file, and two that do not."""
    rng = np.random.default_rng(0)
    found = rng.integers(-9, 9, (5, ROWS, 2)).astype(dtype)
    return {"a": found[0], "b": found[1].T, "c": {"d": found[2], "e": found[3].T}, "f": found[4]}


def assert_put_alike(tree):
    got, wanted = placing.put(tree), jax.device_put(tree)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jax.typeof(x) == jax.typeof(y)
        assert (x.dtype, x.sharding, x.committed) == (y.dtype, y.sharding, y.committed)
        assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", np.int8, np.float64])
def test_threads_put_what_one_puts(dtype):
    assert_put_alike(arrays(dtype))


def test_64_bits_stay_where_they_are_enabled():
    with jax.enable_x64(True):
        assert_put_alike(arrays(np.float64))


def test_a_device_and_a_mesh_of_the_caller_are_kept():
    with jax.default_device(jax.devices()[-1]):
        assert_put_alike(arrays(np.float32))
    mesh = jax.make_mesh((jax.device_count(),), ("x",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert_put_alike(arrays(np.float32))


def test_what_the_caller_forbids_is_an_error():
    tree = arrays(np.float32)
    with jax.transfer_guard("disallow_explicit"), pytest.raises(Exception, match="Disallowed"):
        placing.put(tree)


def test_no_view_of_a_file_is_kept():
    tree = arrays(np.float32)
    got = placing.put(tree)
    tree["a"][:] = 100
    assert np.max(got["a"]) < 100
