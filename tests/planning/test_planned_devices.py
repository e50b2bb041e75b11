"""Plans for a mesh, on eight CPU devices in a process of its own."""

import pytest
from devices import launch

pytestmark = pytest.mark.once


def test_plans_on_eight_devices(tmp_path):
    status, output = launch.run("planned.py", tmp_path)
    assert status == 0, output[-10_000:]
