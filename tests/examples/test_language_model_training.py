"""`examples/language_model.py` and `examples/reinforce.py` as a user runs them, with one layer."""

import re
import sys

import fetch
import jax
import language_model
import meshes
import numpy as np
import pytest
import reinforce
import smollm

import jaxlora
from jaxlora.formats import peft

pytestmark = [
    pytest.mark.once,
    pytest.mark.xdist_group("language_model"),  # one worker makes what its fixtures need
    pytest.mark.skipif(
        not fetch.has(fetch.SMOLLM_GGUF), reason="SmolLM2 is not in the cache: call fetch.smollm()"
    ),
]

QUICK = ("--layers", "1", "--steps", "3", "--save-every", "2", "--held-out", "8", "--qlora")


def run(monkeypatch, module, *options):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        module.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a quick run."""
    out = tmp_path_factory.mktemp("runs") / "language"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, language_model, *QUICK, "--out", out)
    return out


@pytest.fixture(scope="module")
def sites():
    model = smollm.LanguageModel(layers=1)
    params = smollm.load(fetch.smollm(), 1)
    return jaxlora.find_sites(model.apply, params, np.zeros((1, 8), np.int32))


def test_adapters_are_saved_in_both_forms(folder, sites):
    loaded = peft.load(folder / "peft", sites=sites, names=smollm.NAMES)
    assert {path.split("/")[-2] for path in loaded} == set(language_model.TARGETS)
    options = language_model.parse_args([*QUICK, "--out", str(folder)])
    base = language_model.pretrained(options).params
    ours = jaxlora.load_adapters(folder / "adapters", base=base)
    for path, adapter in ours.items():
        scaled = adapter.alpha / adapter.a.shape[-1], loaded[path].alpha / loaded[path].a.shape[-1]
        assert scaled[0] == scaled[1]
        np.testing.assert_array_equal(adapter.a, loaded[path].a)
        np.testing.assert_array_equal(adapter.b, loaded[path].b)
        assert np.abs(adapter.b).max() > 0
    assert (folder / "loss.png").stat().st_size > 1000


def test_a_run_that_is_done_is_told_again(folder, monkeypatch, capsys):
    run(monkeypatch, language_model, *QUICK, "--out", folder, "--resume")
    out = capsys.readouterr().out
    assert re.search(r"^before +\d+\.\d{3} +[\d.]+ +[\d.]+%$", out, re.MULTILINE)
    assert re.search(r"^after +\d+\.\d{3} +[\d.]+ +[\d.]+%$", out, re.MULTILINE)
    assert f"saved to {folder}: adapters, a folder for PEFT, loss.png" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "{} holds a run: go on with --resume, or choose another --out"),
        (("--resume", "--rate", "1"), "the run in {} had other options (--rate is 1.0, was 0.002)"),
        (("--resume", "--mesh", "2by2"), "--mesh must be two numbers, as 4x2: got '2by2'"),
        (("--resume", "--mesh", "16x2"), "--mesh 16x2 needs 32 devices: got "),
    ],
)
def test_what_does_not_fit_a_run_ends_the_program(folder, monkeypatch, options, message):
    with pytest.raises(SystemExit, match=re.escape(message.format(folder))):
        run(monkeypatch, language_model, *QUICK, "--out", folder, *options)


@pytest.mark.parametrize("loss", reinforce.BETAS)
def test_reinforce_prints_rewards(loss, monkeypatch, capsys):
    options = ("--layers", 1, "--steps", 2, "--held-out", 4, "--questions", 1, "--samples", 2)
    run(monkeypatch, reinforce, *options, "--loss", loss)
    out = capsys.readouterr().out
    for name in ("drawn", "likeliest"):
        assert re.search(rf"held out, {name} answers: \d\.\d\d before, \d\.\d\d after", out)


def test_one_device_needs_no_mesh():
    assert meshes.made(None) is None
    tree = meshes.committed({"a": jax.numpy.ones(3)}, None)
    assert tree["a"].committed
