"""Programs of two processes, each with four CPU devices, by `jax.distributed`."""

import pytest
from devices import launch, two_processes
from numpy.testing import assert_array_equal

import jaxlora

pytestmark = pytest.mark.xdist_group("two_processes")  # one worker makes what its fixture needs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder that two processes have worked in, after this one saved there."""
    folder = tmp_path_factory.mktemp("together")
    _, adapters = jaxlora.split(two_processes.adapted(two_processes.weights()))
    jaxlora.save_adapters(folder / "from_one_device", adapters)
    for status, output in launch.run_together("two_processes.py", folder):
        assert status == 0, output[-10_000:]
    return folder


def test_adapters_of_two_processes_load_in_one(folder):
    base, wanted = jaxlora.split(two_processes.adapted(two_processes.weights()))
    loaded = jaxlora.load_adapters(folder / "adapters", base=base)
    assert_array_equal(loaded["dense"].a, wanted["dense"].a)
    assert_array_equal(loaded["dense"].b, wanted["dense"].b)


def test_process_that_ended_is_told_in_the_words_of_this_library(tmp_path):
    for status, output in launch.run_together("ended_process.py", tmp_path):
        assert status == 0, output[-10_000:]
    assert (tmp_path / "left.txt").read_text() == "adapters"
