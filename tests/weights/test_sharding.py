"""Sharded weights, and arrays that are put, on eight CPU devices, a process for each file."""

import pytest
from devices import launch


@pytest.mark.parametrize(
    "checks",
    [
        "placement.py",
        "laws.py",
        pytest.param("quantized.py", marks=pytest.mark.once),
        pytest.param("orders.py", marks=pytest.mark.once),
        "../formats/test_placing.py",
    ],
)
def test_on_eight_devices(checks, tmp_path):
    status, output = launch.run(checks, tmp_path)
    assert status == 0, output[-10_000:]
