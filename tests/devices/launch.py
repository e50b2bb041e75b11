"""Start pytest in processes with several CPU devices each."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
from soak.killed import QUICK

HERE = Path(__file__).parent
OPTIONS = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")


def start(file, output, devices, **environment):
    """Start pytest on a file of this folder, its output going to another file."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | environment
    environment.pop("PYTEST_ADDOPTS", None)  # meant for the run that starts this one
    command = [sys.executable, "-m", "pytest", *OPTIONS, str(HERE / file)]
    with output.open("w") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)


def run(file, folder, *, devices=8):
    """Run the checks of a file on this many devices; return the exit status and the output."""
    output = folder / "output.txt"
    status = start(file, output, devices).wait(timeout=300)
    return status, output.read_text()


def join():
    """Join the processes that `run_together` has started, and return the folder they share."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=os.environ["TOGETHER"],
        num_processes=int(os.environ["TOGETHER_COUNT"]),
        process_id=int(os.environ["TOGETHER_INDEX"]),
    )
    return Path(os.environ["TOGETHER_IN"])


def run_together(file, folder, *, processes=2, devices=4, timeout=120):
    """Run the checks of a file in several processes at once; return each status and output.

    When one of them fails, the others would wait for it, so they are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"TOGETHER": address, "TOGETHER_COUNT": str(processes), "TOGETHER_IN": str(folder)}
    outputs = [folder / f"output_{i}.txt" for i in range(processes)]
    started = [
        start(file, output, devices, TOGETHER_INDEX=str(i), **common)
        for i, output in enumerate(outputs)
    ]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(p.poll() is None for p in started):
        if any(process.poll() for process in started):
            time.sleep(2)  # for the others to tell what they saw
            break
        time.sleep(0.1)
    for process in started:
        process.kill()
    statuses = [process.wait() for process in started]
    return list(zip(statuses, (output.read_text() for output in outputs), strict=True))
