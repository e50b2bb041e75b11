"""Two processes of which one ends: the other says which call waits in vain, and for what."""

import os

import jax
import pytest
from jax.experimental import multihost_utils

import jaxlora
from devices import launch, two_processes


@pytest.fixture
def folder():
    return launch.join()


def test_process_that_ended_is_named(folder):
    base, adapters = jaxlora.split(two_processes.adapted(two_processes.weights()))
    jaxlora.save_adapters(folder / "adapters", adapters)
    multihost_utils.sync_global_devices("saved")
    if jax.process_index() == 1:
        os._exit(0)
    calls = {
        "save_adapters": lambda: jaxlora.save_adapters(folder / "adapters", adapters),
        "load_adapters": lambda: jaxlora.load_adapters(folder / "adapters", base=base),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"^{name} needs every process.* has ended or"):
            call()
    left = [path.name for path in folder.glob("*adapters*")]
    (folder / "left.txt").write_text(",".join(left))
    os._exit(0)  # what shuts the program down would wait for the other
