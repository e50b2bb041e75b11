"""Figures that the compiler for TPU tells, by the benchmarks' scripts; no TPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NEEDED = [
    pytest.mark.once,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jaxlora[tpu]'",
    ),
]


def told(script: str, folder: Path, *options: str) -> dict[str, dict[str, float]]:
    """Return the rows of a benchmark.

    Args:
        script: its file name.
        folder: where it writes.
        options: of its command line.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, BENCHMARKS / script, "--out", folder / "rows.json", *options]
    subprocess.run(command, check=True, env=environment)
    return json.loads((folder / "rows.json").read_text())["results"]
