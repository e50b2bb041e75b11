"""Analysis and algebra of adapters on eight devices."""

import pytest
from devices import launch

pytestmark = pytest.mark.once


def test_decompositions_on_eight_devices(tmp_path):
    status, output = launch.run("decompositions.py", tmp_path)
    assert status == 0, output
