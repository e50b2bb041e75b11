"""The command line in this process or in one of its own, and folders that it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import programs_of_files
from safetensors.numpy import save_file
from typer.testing import CliRunner

import jaxlora
from jaxlora.cli.application import app

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/peft"
PARAMS = {
    "encoder": {
        "up": {
            "kernel": np.random.default_rng(0).standard_normal((12, 20), np.float32),
            "bias": np.zeros(20, np.float32),
        }
    },
    "head": {"kernel": np.random.default_rng(1).standard_normal((20, 5), np.float32)},
}
X = np.ones((2, 12), np.float32)


def model(params, x):
    up, head = params["encoder"]["up"], params["head"]
    return jnp.tanh(x @ up["kernel"] + up["bias"][None]) @ head["kernel"]


def adapters(seed=0, rank=4, **config):
    """Return adapters of the model that change it."""
    given: dict[str, Any] = {"targets": ("kernel",)} | config
    found = jaxlora.LoRAConfig(rank=rank, alpha=2 * rank, **given)
    tree = jaxlora.init(jax.random.key(seed), model, PARAMS, X, config=found)
    key = jax.random.key(seed + 100)
    moved = jaxlora.split(tree)[1]
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), moved)


def saved(path, found):
    jaxlora.save_adapters(path, found)
    return path


def written(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def hub(path, dtype):
    """Write a checkpoint of the weights that the golden folders are for, as PyTorch has them."""
    program = programs_of_files.layers()
    tensors = {"embed.weight": program.params["embed"]}
    for i in range(3):
        tensors[f"layers.{i}.up.weight"] = program.params["up"][i].T
        tensors[f"layers.{i}.up.bias"] = program.params["up_bias"][i]
        tensors[f"layers.{i}.down.weight"] = program.params["down"][i].T
    tensors["head.weight"] = program.params["head"]["kernel"].T
    tensors["head.bias"] = program.params["head"]["bias"]
    path.mkdir()
    tensors = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in tensors.items()}
    save_file(tensors, path / "model.safetensors")
    return tensors


def dense(adapter):
    """Return what an adapter of a matrix adds to it, in float64."""
    a, b = (np.asarray(x).astype(np.float64) for x in (adapter.a, adapter.b))
    return adapter.alpha / adapter.rank * a @ b


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def run(*words):
    """Return the exit code, the output and the errors of a command in this process."""
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def told(*words, code=0):
    """Return what a command prints as JSON."""
    found, out, err = run(*words, "--json")
    assert found == code, err
    return json.loads(out)


def refused(*words):
    """Return the one line that a command says of what it cannot do."""
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("jaxlora: error: ")
    return err.removeprefix("jaxlora: error: ").strip()


def command(*words, folder, before="", **options):
    """Return a command that was run in a process of its own, as a user runs it."""
    code = f"{before}\nimport sys; sys.argv[0] = 'jaxlora'\nfrom jaxlora.cli import main; main()"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
