"""A run on meshes and in several processes: killed, resumed on other devices, still the same."""

import os
import socket

import numpy as np
import pytest
from soak import killed

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        "LONG_RUNS" not in os.environ,
        reason="takes minutes: set LONG_RUNS=1, as `.ci/run --all`",
    ),
]


def devices(count):
    flags = f"--xla_force_host_platform_device_count={count} {killed.QUICK}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def result(folder):
    with np.load(folder / "result.npz") as found:
        return [found[name] for name in found.files]


def near(folder, whole):
    """Check that losses and adapters are those of another run, to the rounding of its sums."""
    for one, other in zip(result(folder), result(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run on one device that nothing has stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    killed.finished(killed.started(folder))
    return folder


def stopped(folder, programs):
    """Kill programs with SIGKILL, the first one at once, when there is a checkpoint."""
    killed.until_saved(folder, *programs)
    for program in programs:
        program.kill()
    for program in programs:
        program.communicate()


def job(folder, mesh, processes, of_each):
    """Start the processes of a run as SLURM's srun does."""
    first = 65535 - 2**12 + 1  # JAX takes the port from the number of the job
    while True:
        number = int(np.random.default_rng().integers(2**12))
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", first + number)):
                break
    common = {"SLURM_JOB_ID": str(number), "SLURM_STEP_NODELIST": "127.0.0.1"}
    common |= {"SLURM_NTASKS": str(processes), "SLURM_STEP_NUM_NODES": "1"} | devices(of_each)
    common |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [
        killed.started(
            folder,
            *("--mesh", mesh, "--distributed"),
            **common,
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
        )
        for i in range(processes)
    ]


def test_a_run_goes_on_with_fewer_and_with_more_devices(whole):
    folder = whole.parent / "meshes"
    for mesh, count in (("4x2", 8), ("2x2", 4)):
        before = killed.checkpoint(folder)
        program = killed.started(folder, "--mesh", mesh, **devices(count))
        killed.until_saved(folder, program, after=before)
        program.kill()
        program.communicate()
    assert not (folder / "result.npz").exists()
    killed.finished(killed.started(folder, "--mesh", "4x2", **devices(8)))
    near(folder, whole)


def test_processes_that_are_killed_go_on_as_others(whole):
    folder = whole.parent / "processes"
    stopped(folder, job(folder, "4x2", processes=2, of_each=4))
    assert not (folder / "result.npz").exists()
    programs = job(folder, "4x2", processes=4, of_each=2)
    for program in programs:
        killed.finished(program)
    near(folder, whole)


def test_sigterm_to_one_process_stops_all_at_one_step(whole):
    folder = whole.parent / "asked"
    programs = job(folder, "4x2", processes=2, of_each=4)
    killed.until_saved(folder, *programs)
    programs[1].terminate()
    output = [program.communicate()[0] for program in programs]
    assert [program.returncode for program in programs] == [143, 143]
    step = killed.checkpoint(folder)
    assert f"stopped at step {step}, which is saved in {folder}, for --resume" in output[0]
    for program in job(folder, "4x2", processes=2, of_each=4):
        killed.finished(program)
    near(folder, whole)
