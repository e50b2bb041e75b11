"""A run is killed with SIGKILL at random instants and resumed: it must end as if it had never been.

    python tests/soak/killed.py --kills 200

Losses and adapters are compared bit for bit with those of a run that nothing has stopped.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "small_run.py"
# XLA's own passes stay as they are; LLVM, after them, takes half as long
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a program whose folder is this one."""
    paths = [str(ROOT), str(ROOT / "examples")]
    compiled = {  # quickly, and once
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | compiled


def started(folder: Path, *more: str, **variables: str) -> subprocess.Popen[str]:
    """Start the program, or go on with what is in its folder.

    Args:
        folder: of the run.
        more: arguments.
        variables: of the environment.
    """
    pipe = subprocess.PIPE
    command = [sys.executable, str(PROGRAM), str(folder), *more]
    variables = environment(folder) | variables
    return subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True)


def finished(program: subprocess.Popen[str]) -> None:
    """Wait for a program that nothing stops."""
    _, errors = program.communicate()
    if program.returncode:
        raise RuntimeError(f"the run ended with {program.returncode}:\n{errors}")


def checkpoint(folder: Path) -> int:
    """Return the step of the last checkpoint that is whole, 0 if there is none."""
    names = (path.name for path in folder.glob("checkpoints/*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def until_saved(folder: Path, *programs: subprocess.Popen[str], after: int = 0) -> None:
    """Wait until programs that go on have saved a checkpoint other than that of a step."""
    while checkpoint(folder) == after:
        for program in programs:
            assert program.poll() is None, program.communicate()[1][-5000:]
        time.sleep(0.005)


def soak(folder: Path, kills: int, seed: int) -> list[int]:
    """Kill runs so many times; return the step of the last checkpoint at each kill.

    Raises:
        AssertionError: a run that was resumed ends with other losses or adapters.
        RuntimeError: a run that was resumed fails.
    """
    whole = folder / "whole"
    finished(started(folder / "compiling"))  # those that follow take less long
    begun = time.perf_counter()
    finished(started(whole))
    length = time.perf_counter() - begun
    rng, steps, number = np.random.default_rng(seed), [], 0
    while len(steps) < kills:
        part, number = folder / f"killed{number}", number + 1
        while not (part / "result.npz").exists():
            program = started(part)
            if len(steps) == kills:
                finished(program)
                break
            try:
                program.wait(timeout=rng.uniform(0, 1.1 * length))
            except subprocess.TimeoutExpired:
                program.kill()
                program.communicate()
                steps.append(checkpoint(part))
            else:
                finished(program)
        compare(whole / "result.npz", part / "result.npz")
    return steps


def compare(one: Path, other: Path) -> None:
    """Raise if two results are not equal, bit for bit."""
    with np.load(one) as first, np.load(other) as second:
        assert first.files == second.files
        for name in first.files:
            np.testing.assert_array_equal(first[name], second[name], strict=True)


def main() -> None:
    """Run the soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = soak(Path(folder), options.kills, options.seed)
    late = sum(step > 0 for step in steps)
    print(f"{len(steps)} kills, {late} of them after a checkpoint: all runs ended bit-equal")


if __name__ == "__main__":
    main()
