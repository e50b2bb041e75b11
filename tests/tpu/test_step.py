"""What the compiler for TPU makes of a training step, by its own counts; no TPU is needed.

The bounds are a few percent above what was counted, see `benchmarks/tpu.py`: they hold that an
attention over adapted queries is fused as over plain ones, and that activations are not copied.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jaxlora[tpu]'",
    ),
]
SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "tpu.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("tpu") / "rows.json"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    cases = ["queries and values", "without remat", "512 tokens", "decoding"]
    command = [sys.executable, SCRIPT, "--out", out, "--cases", *cases]
    subprocess.run(command, check=True, env=environment)
    return json.loads(out.read_text())["results"]


BOUNDS = {
    "queries and values": {"best_ms": 1.03, "gb": 1.06, "temp_gb": 1.03, "gflops": 1.01},
    "without remat": {"best_ms": 1.03, "gb": 1.06, "temp_gb": 1.0, "gflops": 1.01},
    "512 tokens": {"best_ms": 1.24, "gb": 1.38, "temp_gb": 1.36, "gflops": 1.02},
    "decoding": {"gb": 1.05},
}


@pytest.mark.parametrize("case", BOUNDS)
def test_step_costs_little_more_than_the_frozen_models(rows, case):
    row = rows[f"{case}: lora"]
    assert {
        name: row[f"{name}_over_floor"]
        for name, bound in BOUNDS[case].items()
        if row[f"{name}_over_floor"] > bound
    } == {}
