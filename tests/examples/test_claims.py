"""The claims that `examples/reproduce.py` tries: what they are made of, and each tried quickly."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fetch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reproduce
import scipy.stats
from claims import arms, lab, report, tasks
from claims.training import Run
from soak import killed

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
FILES = tuple(fetch.SHA256)


def linear(params, x):
    return x @ params["layer"]["kernel"] + params["head"]["bias"][None]


def task():
    """Return a task of a model of two leaves."""
    key = jax.random.key(0)
    params = {
        "layer": {"kernel": jax.random.normal(key, (6, 4)), "bias": jnp.zeros(4)},
        "head": {"bias": jnp.zeros(4)},
    }
    return tasks.Task(
        name="linear",
        fn=linear,
        params=params,
        example=(jnp.ones((1, 6)),),
        inputs=lambda batch: (batch,),
        loss=lambda out, batch: (out**2).mean(),
        batches=lambda seed: iter([]),
        score=lambda predict, params, part: 0.0,
        general=lambda params: 0.0,
        probe=lambda: None,
        weights={"all": ("layer",)},
        leaves={"new": "head/.*", "head": "head/.*", "biases": ".*/bias", "all": ".*"},
        higher_is_better=True,
        steps=1,
    )


@pytest.mark.parametrize(
    ("arm", "leaves", "adapted"),
    [
        (arms.lora(2), {"head/bias"}, {"layer/kernel"}),
        (arms.FULL, {"head/bias", "layer/bias", "layer/kernel"}, set()),
        (arms.BIASES, {"head/bias", "layer/bias"}, set()),
        (arms.HEAD, {"head/bias"}, set()),
    ],
    ids=lambda x: x.name if isinstance(x, arms.Arm) else "",
)
def test_arms_train_what_they_say_from_what_the_model_is(arm, leaves, adapted):
    trainable, frozen = arms.start(arm, task(), seed=0)
    assert set(trainable.leaves) == leaves
    assert set(trainable.adapters) == adapted
    params = arms.together(arm)(trainable, frozen)
    assert (jax.tree.structure(params) == jax.tree.structure(task().params)) == (not adapted)
    moved = jax.tree.map(lambda leaf: leaf + 1, trainable.leaves)
    found = arms.together(arm)(trainable._replace(leaves=moved), frozen)
    for path, leaf in jax.tree.leaves_with_path(task().params):
        if (name := tasks.path_of(path)) not in adapted:
            got = dict(jax.tree.leaves_with_path(found))[path]
            np.testing.assert_array_equal(got, leaf + float(name in leaves))


@pytest.mark.parametrize("dimension", [1, 3, 7])
def test_subspace_has_orthogonal_directions_of_signs(dimension):
    arm = arms.subspace(dimension)
    trainable, frozen = arms.start(arm, task(), seed=0)

    def moved(z):
        params = arms.together(arm)(trainable._replace(leaves={"coordinates": z}), frozen)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])

    directions = np.asarray(jax.jacobian(moved)(jnp.zeros(dimension)))  # (parameters, dimension)
    assert set(np.unique(directions)) <= {-1.0, 0.0, 1.0}
    assert (np.abs(directions).sum(1) == 1).all()
    gram = directions.T @ directions
    np.testing.assert_array_equal(gram, np.diag(np.diag(gram)))
    other, _ = arms.start(arm, task(), seed=1)[1]
    jax.tree.map(np.testing.assert_array_equal, other, task().params)


def test_standard_error_is_scipys():
    values = [1.0, 2.5, 4.0, 3.0]
    mean, error = report.mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(scipy.stats.sem(values))
    assert np.isnan(report.mean_and_error([1.0])[1])


def reproduced(folder, *options):
    command = [sys.executable, "examples/reproduce.py", *options]
    command += ["--runs", f"{folder}/runs", "--out", f"{folder}/results"]
    environment = os.environ | {"XLA_FLAGS": killed.QUICK}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not fetch.has(*FILES), reason="weights and data are not in the cache")
def test_claims_run_quickly_and_go_on_from_the_runs_that_are_there(tmp_path):
    out = reproduced(tmp_path, "all", "--quick", "--processes", "2")
    assert re.findall(r"^== (\w+):", out, re.MULTILINE) == list(reproduce.CLAIMS)
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*.json")}
    for name in reproduce.CLAIMS:
        found = json.loads((tmp_path / f"results/{name}.json").read_text())
        assert all(len(row) == len(found["columns"]) for row in found["rows"])
        assert (tmp_path / f"results/{name}.png").stat().st_size > 1000
    fields = {field.name for field in dataclasses.fields(Run)}
    one = json.loads(next(iter(runs)).read_text())
    assert set(one) == fields
    assert np.isfinite([value for value in one.values() if isinstance(value, float)]).all()
    again = reproduced(tmp_path, "ranks_and_weights", "--quick")
    first, second = (re.findall(r"== ranks_and_weights:[^=]*", text) for text in (out, again))
    assert first == second != []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*.json")} == runs


@pytest.mark.parametrize("name", reproduce.CLAIMS)
def test_every_claim_has_been_tried_and_is_shown(name):
    found = json.loads((reproduce.RESULTS / f"{name}.json").read_text())
    assert found["rows"]
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    page = (ROOT / "docs/guides/claims.md").read_text()
    assert f"<!-- claim {name} -->\n" in page
    assert f"(../../benchmarks/results/claims/{name}.png)" in page
    assert (reproduce.RESULTS / f"{name}.png").exists()


def test_a_run_that_two_want_at_once_is_made_once(tmp_path, monkeypatch):
    begun = []

    def batches(seed):
        begun.append(seed)
        time.sleep(0.5)
        return iter([jnp.ones((2, 6))] * 3)

    linear_task = dataclasses.replace(task(), batches=batches, steps=3)
    monkeypatch.setitem(lab.TASKS, "linear", lambda quick: linear_task)
    labs = [lab.Lab(tmp_path, (0,)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda each: each.run("linear", arms.lora(2), 1e-3, 0), labs)
    assert first == second
    assert begun == [0]


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        (["rates", "--seeds", "0"], "--seeds must be 1 or more: got 0"),
        (["rates", "--processes", "0"], "--processes must be 1 or more: got 0"),
        (["nothing"], "ranks_and_weights"),
    ],
)
def test_wrong_options_are_errors_that_say_what_there_is(options, listed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *options])
    with pytest.raises(SystemExit) as stopped:
        reproduce.parse()
    assert stopped.value.code == 2
    assert listed in capsys.readouterr().err
