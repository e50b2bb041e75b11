"""``spectrum``, ``similarity`` and ``plan``, against NumPy and what the library returns."""

import jax
import numpy as np
import optax
import pytest
from command_line import (
    GOLDEN,
    PARAMS,
    X,
    adapters,
    command,
    dense,
    model,
    refused,
    run,
    saved,
    told,
)
from matplotlib import image
from numpy.testing import assert_allclose

import jaxlora
from jaxlora import planning

pytestmark = pytest.mark.once


def planned():
    """Return what the command is given a name of."""
    return model, jax.eval_shape(lambda: PARAMS), X


def test_spectrum_tells_the_singular_values(tmp_path):
    found = adapters()
    report = told("spectrum", saved(tmp_path / "run", found), "--plot", tmp_path / "it.png")
    assert report["weights"].keys() == found.keys()
    for path, adapter in found.items():
        values = np.linalg.svd(dense(adapter), compute_uv=False)[:4]
        row = report["weights"][path]
        assert_allclose(row["values"], values, rtol=1e-5)
        assert_allclose(row["energy"], np.cumsum(values**2) / np.sum(values**2), rtol=1e-5)
        assert row["dead"] == 0
    assert image.imread(tmp_path / "it.png").ndim == 3
    code, out, _ = run("spectrum", tmp_path / "run")
    assert code == 0
    assert "effective" in out


def test_similarity_of_folders_of_two_ranks(tmp_path):
    one, other = adapters(0, 4), adapters(1, 2)
    first, second = saved(tmp_path / "first", one), saved(tmp_path / "second", other)
    report = told("similarity", first, second, "--side", "out")
    for path, adapter in one.items():
        v, w = (np.linalg.svd(dense(x))[2][: x.rank].T for x in (adapter, other[path]))
        got = np.array(report["weights"][path]["phi"])
        assert got.shape == (4, 2)
        assert_allclose(got[3, 1], np.linalg.norm(v.T @ w) ** 2 / 2, rtol=1e-4)
    head = "head/kernel"
    code, _, err = run("similarity", first, second, "--plot", tmp_path / "it.svg", "--path", head)
    assert code == 0, err
    assert "<svg" in (tmp_path / "it.svg").read_text()


def test_spectrum_of_a_folder_of_peft():
    assert told("spectrum", GOLDEN / "lora")["weights"]


def test_pictures_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    folder = saved(tmp_path / "run", adapters())
    before = {*tmp_path.iterdir()}
    assert "must end in one of" in refused("spectrum", folder, "--plot", tmp_path / "it.txt")
    assert "there is no folder" in refused("spectrum", folder, "--plot", tmp_path / "no/it.png")
    several = refused("similarity", folder, folder, "--plot", tmp_path / "it.png")
    assert several.startswith("--path is needed to draw one of 2 weights")
    wrong = ("--plot", tmp_path / "it.png", "--path", "head/kernal")
    assert "nearest: 'head/kernel'" in refused("similarity", folder, folder, *wrong)
    assert {*tmp_path.iterdir()} == before


def test_plan_is_that_of_the_library(tmp_path):
    config = jaxlora.LoRAConfig(rank=2, targets=("kernel",))
    fn, params, x = planned()
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        report = told("plan", f"{__file__}:planned", "--rank", "2", "--target", "kernel")
        found = planning.plan(fn, params, x, config=config, optimizer=optax.adamw(1e-4))
    assert found.full is not None
    assert report["lora"]["trained"] == found.trained == 2 * (12 + 20) + 2 * (20 + 5)
    assert report["lora"]["argument_bytes"] == found.argument_bytes
    assert report["full"]["flops"] == found.full.flops
    code, out, _ = run("plan", f"{__file__}:planned", "--optimizer", "sgd")
    assert code == 0
    assert "full fine-tuning" in out


@pytest.mark.parametrize("name", ["adma", "chain", "apply_updates", "safe_norm"])
def test_an_optimizer_that_is_none_is_refused(name):
    assert "must be a function of optax" in refused(
        "plan", f"{__file__}:planned", "--optimizer", name
    )


def test_what_is_no_model_is_refused_in_one_line(tmp_path):
    assert "module:object or file.py:object is needed" in refused("plan", "model")
    assert "must be a function without arguments" in refused("plan", f"{__file__}:PARAMS")
    (tmp_path / "broken.py").write_text("def model(): return undefined")
    assert "NameError" in refused("plan", f"{tmp_path / 'broken.py'}:model")


def test_a_model_in_a_file_is_found_with_what_lies_beside_it(tmp_path):
    (tmp_path / "sizes_of_it.py").write_text("WIDTH = 12")
    (tmp_path / "shape.txt").write_text("5")
    (tmp_path / "model_of_it.py").write_text(
        "from pathlib import Path\n"
        "import jax\n"
        "import sizes_of_it\n"
        "OUT = int((Path(__file__).parent / 'shape.txt').read_text())\n"
        "def small():\n"
        "    w = jax.ShapeDtypeStruct((sizes_of_it.WIDTH, OUT), 'float32')\n"
        "    return lambda p, x: x @ p['w'], {'w': w}, jax.ShapeDtypeStruct((2, 12), 'float32')\n"
        "def broken():\n"
        "    return lambda p, x: x @ p['wrong'], *small()[1:]\n"
    )
    with jax.numpy_dtype_promotion("standard"):
        report = told("plan", f"{tmp_path / 'model_of_it.py'}:small", "--rank", "2")
    assert report["lora"]["trained"] == 2 * (12 + 5)
    assert "KeyError: 'wrong'" in refused("plan", f"{tmp_path / 'model_of_it.py'}:broken")


def test_a_full_disk_leaves_no_picture(tmp_path):
    pytest.importorskip("resource", reason="limits of file sizes are of POSIX")
    saved(tmp_path / "run", adapters())
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "import matplotlib.font_manager\n"  # which keeps a file of its own
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    done = command("spectrum", "run", "--plot", "it.png", folder=tmp_path, before=limit)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "File too large" in done.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["run"]
