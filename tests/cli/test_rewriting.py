"""Commands that write folders: ``convert``, ``combine``, ``truncate``."""

import dataclasses
import json
import shutil
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import programs_of_files
import pytest
from command_line import GOLDEN, PARAMS, X, adapters, dense, equal, model, refused, run, saved, told
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

import jaxlora
from jaxlora.formats import peft

pytestmark = pytest.mark.once
TENSORS = "adapter_model.safetensors"


def test_convert_goes_to_peft_and_back(tmp_path):
    found = adapters(train=("bias",))
    run_ = saved(tmp_path / "run", found)
    report = told("convert", run_, tmp_path / "peft", "--base", "my/model")
    assert (report["kind"], report["paths"]) == ("peft", [*found])
    tensors = load_file(tmp_path / "peft" / TENSORS)
    assert_array_equal(
        tensors["base_model.model.encoder.up.lora_A.weight"], found["encoder/up/kernel"].a.T
    )
    assert told("inspect", tmp_path / "peft")["base"]["name"] == "my/model"
    code, _, err = run("convert", tmp_path / "peft", tmp_path / "back")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("jaxlora: warning: the values of the base of ")
    back = jaxlora.load_adapters(tmp_path / "back", base=PARAMS)
    assert back.keys() == found.keys()
    for path in found:
        equal(back[path].trained(), found[path].trained())
    assert not told("diff", run_, tmp_path / "peft")["differs"]


MODEL = """
import programs_of_files

program = programs_of_files.layers()
NAMES = program.names

def example():
    return program.fn, program.params, program.x
"""


def test_convert_with_names_and_a_model(tmp_path):
    file = tmp_path / "my_model.py"
    file.write_text(textwrap.dedent(MODEL))
    given = ("--names", f"{file}:NAMES", "--model", f"{file}:example")
    for name in ("patterns", "tokens", "saved_layer"):
        told("convert", GOLDEN / name, tmp_path / name, *given)
        program = programs_of_files.layers()
        loaded = jaxlora.load_adapters(tmp_path / name, base=program.params)
        got = jaxlora.lora(program.fn)(jaxlora.bind(program.params, loaded), program.x)
        wanted = np.load(GOLDEN / name / "output.npy")
        assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    told("convert", tmp_path / "patterns", tmp_path / "back", *given)
    theirs, ours = (load_file(x / TENSORS) for x in (GOLDEN / "patterns", tmp_path / "back"))
    equal(ours, theirs)


def test_convert_says_what_it_needs(tmp_path):
    (tmp_path / "names.py").write_text("NAMES = 3\ndef example():\n    return 4\n")
    out, file = tmp_path / "out", tmp_path / "names.py"
    lora = GOLDEN / "lora"
    known = "jaxlora.formats.models:BERT_FLAX"
    assert "--model is missing" in refused("convert", lora, out, "--names", known)
    assert "must be a jaxlora.formats.Names: got 3" in refused(
        "convert", lora, out, "--names", f"{file}:NAMES"
    )
    assert "has no 'other'" in refused("convert", lora, out, "--names", f"{file}:other")
    assert "module:object" in refused("convert", lora, out, "--names", "names")
    assert "'no.py' cannot be used: FileNotFoundError" in refused(
        "convert", lora, out, "--names", "no.py:x"
    )
    assert "cannot be used: ModuleNotFoundError" in refused(
        "convert", lora, out, "--names", "no_such:x"
    )
    (tmp_path / "wrong.py").write_text("def example(:\n")
    assert "cannot be used: SyntaxError" in refused(
        "convert", lora, out, "--names", f"{tmp_path / 'wrong.py'}:example"
    )
    (tmp_path / "fails.py").write_text("def example():\n    return 1 / 0\n")
    assert "cannot be used: ZeroDivisionError: division by zero" in refused(
        "convert", lora, out, "--model", f"{tmp_path / 'fails.py'}:example"
    )
    assert "returns (fn, params, *args)" in refused(
        "convert", lora, out, "--model", f"{file}:example"
    )
    assert "--names and --model are needed" in refused("convert", GOLDEN / "saved_head", out)

    def stacked(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["kernel"])[0]

    config = jaxlora.LoRAConfig(rank=1)
    params, x = {"kernel": jnp.ones((2, 3, 3))}, jnp.ones((1, 3))
    tree = jaxlora.init(jax.random.key(0), stacked, params, x, config=config)
    run_ = saved(tmp_path / "run", jaxlora.split(tree)[1])
    assert "no name of PEFT follows from 'kernel'" in refused("convert", run_, out)
    assert not out.exists()


def test_combine_is_the_weighted_sum(tmp_path):
    one, two = adapters(0), adapters(1, rank=2, targets=("head",))
    a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", two)
    report = told("combine", a, b, tmp_path / "out", "--weights", "0.7,-0.3")
    assert report["ranks"] == {"encoder/up/kernel": 4, "head/kernel": 6}
    found = jaxlora.load_adapters(tmp_path / "out", base=PARAMS)
    wanted = 0.7 * dense(one["head/kernel"]) - 0.3 * dense(two["head/kernel"])
    assert_allclose(dense(found["head/kernel"]), wanted, atol=1e-6)
    assert_allclose(
        dense(found["encoder/up/kernel"]), 0.7 * dense(one["encoder/up/kernel"]), atol=1e-6
    )
    three = told("combine", a, a, a, tmp_path / "out", "--method", "svd", "--rank", "4")
    assert {*three["ranks"].values()} == {4}
    found = jaxlora.load_adapters(tmp_path / "out", base=PARAMS)
    assert_allclose(dense(found["head/kernel"]), 3 * dense(one["head/kernel"]), atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties_svd"])
def test_combine_by_a_method_is_what_the_library_returns(method, tmp_path):
    one, two = adapters(0), adapters(1)
    a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", two)
    options = [] if method == "linear" else ["--density", "0.5"]
    told("combine", a, b, tmp_path / "out", "--method", method, *options)
    key = jax.random.key(0) if "dare" in method else None
    density = 0.5 if options else None
    wanted = peft.combine([one, two], [1.0, 1.0], method, density=density, key=key)
    found = jaxlora.load_adapters(tmp_path / "out", base=PARAMS)
    for path, adapter in wanted.items():
        equal(found[path].trained(), adapter.trained())


def test_combine_of_folders_of_peft_is_one_of_peft(tmp_path):
    told("combine", GOLDEN / "lora", GOLDEN / "embedding", tmp_path / "out")
    told("inspect", tmp_path / "out")
    own = [load_file(folder / TENSORS) for folder in (GOLDEN / "lora", GOLDEN / "embedding")]
    config = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    found = load_file(tmp_path / "out" / TENSORS)
    assert found.keys() == own[0].keys() | own[1].keys()
    key = "base_model.model.layers.0.up.lora_{}.weight"
    a, b = (found[key.format(x)] for x in "AB")
    wanted = sum(scaling * tensors[key.format("B")] @ tensors[key.format("A")] for tensors in own)
    assert_allclose(b @ a, wanted, atol=1e-5)  # of scaling 1


CONFIG = "adapter_config.json"
REWRITTEN = {
    *("peft_type", "peft_version", "r", "lora_alpha", "use_rslora", "use_dora", "bias"),
    *("rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "exclude_modules"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices"),
}
SAID = {
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "my/base",
    "revision": "v2",
    "inference_mode": False,
    "lora_dropout": 0.05,
}


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def saying(folder, name="lora", **said):
    """Return a copy of a golden folder of PEFT, whose config says more."""
    shutil.copytree(GOLDEN / name, folder)
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | said))
    return folder


@pytest.mark.parametrize("name", ["lora", "patterns", "stabilized", "some_layers", "convolutions"])
@pytest.mark.parametrize("words", [("truncate", "--rank", 1), ("combine",)])
def test_a_config_of_peft_keeps_what_is_not_of_its_factors(words, name, tmp_path):
    source = saying(tmp_path / "a", name, **SAID)
    told(words[0], source, tmp_path / "b", *words[1:])
    given, made = (
        {k: x for k, x in config_of(y).items() if k not in REWRITTEN}
        for y in (source, tmp_path / "b")
    )
    assert made == given
    assert given.items() >= SAID.items()
    assert len(made) > 20
    report = told("diff", source, tmp_path / "b", code=int(words[0] == "truncate"))
    assert all(row["why"] in ("", "they are not equal") for row in report["weights"])


@pytest.mark.parametrize("name", ["elementwise", "singular_values"])
def test_a_config_of_another_type_keeps_what_all_types_have(name, tmp_path):
    said = {key: x for key, x in SAID.items() if key != "lora_dropout"}
    source = saying(tmp_path / "a", name, **said)
    told("combine", source, tmp_path / "b")
    made = config_of(tmp_path / "b")
    assert made.items() >= (said | {"peft_type": "LORA"}).items()
    assert not {"module_dropout", "target_r", "tinit", "orth_reg_weight"} & made.keys()


def test_combine_refuses_folders_for_different_bases(tmp_path):
    a, b = (saying(tmp_path / x, base_model_name_or_path=f"my/{x}") for x in "ab")
    told_ = refused("combine", a, b, tmp_path / "out")
    assert "base_model_name_or_path is 'my/a' in " in told_
    assert "name another behind it" in refused("combine", a, b)  # and not b written over
    c = saying(tmp_path / "c", base_model_name_or_path="my/a", revision="v1")
    d = saying(tmp_path / "d", base_model_name_or_path="my/a", revision="v2")
    assert "revision is 'v1' in " in refused("combine", c, d, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_combine_warns_of_a_base_that_one_folder_alone_names(tmp_path):
    named = saying(tmp_path / "a", base_model_name_or_path="my/a")
    code, _, err = run("combine", GOLDEN / "lora", named, tmp_path / "out")
    assert (code, err.count("\n")) == (0, 1)
    assert f"has no base_model_name_or_path: taken to be 'my/a', as {named} has it" in err
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "my/a"
    code, _, err = run("combine", named, GOLDEN / "lora", tmp_path / "out")
    assert f"{GOLDEN / 'lora'} has no base_model_name_or_path" in err
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "my/a"


def test_combine_warns_of_what_else_differs(tmp_path):
    a = saying(tmp_path / "a", task_type="CAUSAL_LM", lora_dropout=0.1)
    b = saying(tmp_path / "b", task_type="SEQ_CLS", lora_dropout=0.1)
    code, _, err = run("combine", a, b, tmp_path / "out")
    assert (code, err.count("\n")) == (0, 1)
    assert f"{b} has another task_type in its {CONFIG} than {a}, whose is kept" in err
    made = config_of(tmp_path / "out")
    assert (made["task_type"], made["lora_dropout"]) == ("CAUSAL_LM", 0.1)


def test_combine_refuses_in_one_line(tmp_path):
    a, out = saved(tmp_path / "a", adapters()), tmp_path / "out"
    assert "must be of one kind" in refused("combine", a, GOLDEN / "lora", out)
    assert "weights must be numbers" in refused("combine", a, a, out, "--weights", "1;2")
    assert "one weight for each" in refused("combine", a, a, out, "--weights", "1")
    assert "needs density" in refused("combine", a, a, out, "--method", "ties")
    assert "does not use density" in refused("combine", a, a, out, "--density", "0.5")
    dora = saved(tmp_path / "dora", adapters(magnitude=True))
    assert "has a magnitude" in refused("combine", a, dora, out)
    assert not out.exists()


def test_truncate_to_a_rank_is_the_nearest(tmp_path):
    found = adapters()
    report = told("truncate", saved(tmp_path / "a", found), tmp_path / "out", "--rank", 2)
    smaller = jaxlora.load_adapters(tmp_path / "out", base=PARAMS)
    for row in report["weights"]:
        u, s, v = np.linalg.svd(dense(found[row["path"]]), full_matrices=False)
        assert row["rank"] == [4, 2]
        assert row["energy"] == pytest.approx((s[:2] ** 2).sum() / (s**2).sum())
        assert_allclose(dense(smaller[row["path"]]), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_truncate_keeps_a_share_of_the_squared_norm(energy, tmp_path):
    found = adapters()
    a = saved(tmp_path / "a", found)
    for row in told("truncate", a, tmp_path / "out", "--energy", energy)["weights"]:
        s = np.linalg.svd(dense(found[row["path"]]), compute_uv=False)[:4]
        shares = np.cumsum(s**2) / (s**2).sum()
        assert row["rank"][1] == 1 + int((shares < energy * (1 - 1e-12)).sum())
        assert row["energy"] >= energy - 1e-9
    smaller = jaxlora.load_adapters(tmp_path / "out", base=PARAMS)
    got = jaxlora.lora(model)(jaxlora.bind(PARAMS, smaller), X)
    assert got.shape == (2, 5)


def test_truncate_of_a_stack_keeps_the_share_of_every_entry(tmp_path):
    def stacked(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    params, x = {"w": jnp.ones((3, 6, 6))}, jnp.ones((2, 6))
    config = jaxlora.LoRAConfig(rank=4, alpha=4)
    tree = jaxlora.init(jax.random.key(0), stacked, params, x, config=config)
    b = jnp.zeros((3, 4, 6)).at[0, 0].set(1).at[1, :3].set(jnp.eye(6)[:3])  # ranks 1, 3 and 0
    tree["w"] = jaxlora.bind(params, {"w": dataclasses.replace(jaxlora.split(tree)[1]["w"], b=b)})[
        "w"
    ]
    a = saved(tmp_path / "a", jaxlora.split(tree)[1])
    (row,) = told("truncate", a, tmp_path / "out", "--energy", 1)["weights"]
    assert row["rank"] == [4, 3]


def test_truncate_refuses_in_one_line(tmp_path):
    a, out = saved(tmp_path / "a", adapters()), tmp_path / "out"
    assert "one of --rank and --energy is needed: got none" in refused("truncate", a, out)
    assert "got both" in refused("truncate", a, out, "--rank", 1, "--energy", 0.5)
    assert "energy must be in (0, 1]: got 1.5" in refused("truncate", a, out, "--energy", 1.5)
    assert "rank must be at least 1: got 0" in refused("truncate", a, out, "--rank", 0)
    assert not out.exists()
