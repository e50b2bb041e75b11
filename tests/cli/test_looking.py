"""``inspect`` and ``diff``: what folders hold and how they differ, against NumPy."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import programs_of_files
import pytest
from command_line import GOLDEN, PARAMS, X, adapters, dense, model, refused, run, saved, told
from safetensors.numpy import load_file, save_file

import jaxlora

pytestmark = pytest.mark.once
TENSORS = "adapter_model.safetensors"
UNTOLD = {"experts", "projections", "tokens"}  # of these a folder does not tell how they lie


def test_inspect_tells_what_a_folder_of_ours_holds(tmp_path):
    found = adapters()
    report = told("inspect", saved(tmp_path / "run", found))
    assert (report["kind"], report["not_finite"], report["replaced"]) == ("jaxlora", [], [])
    assert (report["form"], report["version"]) == ("jaxlora, format 2", jaxlora.__version__)
    assert report["base"] == {
        "name": None,
        "dtypes": ["float32"],
        "known_weights": 2,
        "weights": 2,
    }
    assert report["parameters"] == 4 * (12 + 20) + 4 * (20 + 5)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert report["bytes"] == 4 * report["parameters"]
    assert report["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    by_path = {row["path"]: row for row in report["adapters"]}
    assert by_path.keys() == found.keys()
    for path, adapter in found.items():
        row = by_path[path]
        assert (row["rank"], row["alpha"], row["scaling"]) == (4, 8, 2)
        assert row["norm"] == pytest.approx(np.linalg.norm(dense(adapter)), rel=1e-12)
        assert row["norm_a"] == pytest.approx(float(jnp.linalg.norm(adapter.a)), rel=1e-6)
        assert row["base"] == adapter.fingerprint.digest


def test_inspect_counts_directions_that_add_nothing(tmp_path):
    found = adapters()
    path = "head/kernel"
    b = found[path].b.at[1].set(0)
    found[path] = dataclasses.replace(found[path], a=found[path].a.at[:, 3].set(0), b=b)
    report = told("inspect", saved(tmp_path / "run", found))
    assert {row["path"]: row["dead"] for row in report["adapters"]} == {
        "encoder/up/kernel": 0,
        path: 2,
    }
    _, out, _ = run("inspect", tmp_path / "run")
    assert "2 of 4" in out


def test_inspect_tells_of_stacks_parts_magnitudes_and_replaced_leaves(tmp_path):
    def stacked(params, x):
        for i in range(3):
            x = x @ params["layers"][i]
        return x + params["bias"][None]

    params = {"layers": jnp.ones((3, 6, 6)), "bias": jnp.ones(6)}
    x = jnp.ones((2, 6))
    for name, targets in {"whole": ("layers",), "part": ("layers[:, :, 0:2]",)}.items():
        config = jaxlora.LoRAConfig(rank=2, targets=targets, train=("bias",), magnitude=True)
        tree = jaxlora.init(jax.random.key(0), stacked, params, x, config=config)
        jaxlora.save_adapters(tmp_path / name, jaxlora.split(tree)[1])
        report = told("inspect", tmp_path / name)
        (row,), (bias,) = report["adapters"], report["replaced"]
        assert (row["path"], row["shape"], row["stack"]) == (targets[0], [3, 6, 6], [0])
        assert (row["dead"], row["directions"]) == (6, 6)  # b is zero
        width = 6 if name == "whole" else 2
        assert row["norm_magnitude"] == pytest.approx(np.sqrt(3 * width * 6), rel=1e-6)
        assert (bias["path"], bias["rows"], bias["norm_value"]) == (
            "bias",
            None,
            pytest.approx(6**0.5),
        )


@pytest.mark.parametrize("name", sorted(programs_of_files.CASES.keys() - UNTOLD))
@pytest.mark.filterwarnings("ignore:.*has also the weight that")
def test_inspect_reads_folders_of_peft_without_a_model(name):
    report = told("inspect", GOLDEN / name)
    tensors = load_file(GOLDEN / name / TENSORS)
    assert report["kind"] == "peft"
    assert report["version"] == "0.21.2"
    own = {key: x for key, x in tensors.items() if "base_layer.weight" not in key}
    if report["form"] == "PEFT, LORA":
        assert report["parameters"] == sum(tensor.size for tensor in own.values())
    assert all(row["norm"] > 0 for row in report["adapters"])


def test_inspect_of_peft_has_the_norms_that_numpy_finds():
    report = told("inspect", GOLDEN / "stabilized")
    tensors = load_file(GOLDEN / "stabilized" / TENSORS)
    config = json.loads((GOLDEN / "stabilized" / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / np.sqrt(config["r"])
    for row in report["adapters"]:
        module = row["path"].removesuffix("/kernel").replace("/", ".")
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        assert row["norm"] == pytest.approx(np.linalg.norm(scaling * b @ a), rel=1e-5)
        assert row["shape"] == [a.shape[1], b.shape[0]]


@pytest.mark.parametrize("name", sorted(UNTOLD))
def test_what_a_folder_does_not_tell_is_refused(name):
    assert "names and the program that it is for are needed" in refused("inspect", GOLDEN / name)


def with_nan(folder, name="lora"):
    """Return a copy of a folder of PEFT, of which a factor holds NaN."""
    shutil.copytree(GOLDEN / name, folder)
    tensors = load_file(folder / TENSORS)
    first = min(key for key in tensors if "lora_B" in key)
    save_file(tensors | {first: np.full_like(tensors[first], np.nan)}, folder / TENSORS)
    return first.removeprefix("base_model.model.").removesuffix(".lora_B.weight")


def test_nan_is_shown_named_and_is_exit_code_1(tmp_path):
    path = with_nan(tmp_path / "bad").replace(".", "/") + "/kernel"
    report = told("inspect", tmp_path / "bad", code=1)
    assert report["not_finite"] == [path]
    (row,) = [row for row in report["adapters"] if row["path"] == path]
    assert (row["norm"], row["not_finite"]) == (None, ["b"])
    code, out, _ = run("inspect", tmp_path / "bad")
    assert (code, "b not finite" in out, "NaN or inf in 1 of them" in out) == (1, True, True)
    assert "hold NaN or inf" in refused("truncate", tmp_path / "bad", tmp_path / "x", "--rank", 1)
    combined = refused("combine", tmp_path / "bad", GOLDEN / "lora", tmp_path / "x")
    assert f"the adapter of '{path}'" in combined
    assert "must be finite to be saved" in refused("convert", tmp_path / "bad", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert told("diff", tmp_path / "bad", tmp_path / "bad", code=1)["differs"]


def test_diff_finds_that_factors_of_other_ranks_add_the_same(tmp_path):
    one = adapters()
    two = jaxlora.algebra.pad(one, 6)
    report = told("diff", saved(tmp_path / "a", one), saved(tmp_path / "b", two))
    assert not report["differs"]
    assert [row["rank"] for row in report["weights"]] == [[4, 6], [4, 6]]
    assert all(row["difference"] < 1e-6 for row in report["weights"])


def test_diff_is_the_relative_norm_that_numpy_finds(tmp_path):
    one, two = adapters(0), adapters(1, rank=2)
    a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", two)
    for row in told("diff", a, b, code=1)["weights"]:
        left, right = dense(one[row["path"]]), dense(two[row["path"]])
        wanted = np.linalg.norm(left - right) / max(map(np.linalg.norm, (left, right)))
        assert row["difference"] == pytest.approx(wanted, rel=1e-9)
    assert told("diff", a, b, "--tolerance", 2)["differs"] is False
    assert [row["difference"] for row in told("diff", a, a)["weights"]] == [0, 0]


def test_diff_names_what_is_in_one_folder_alone(tmp_path):
    one, two = adapters(), adapters(targets=("head",))
    a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", two)
    report = told("diff", a, b, code=1)
    assert (report["only_a"], report["only_b"]) == (["encoder/up/kernel"], [])
    code, out, _ = run("diff", b, a)
    assert (code, f"only in {a}" in out) == (1, True)


def test_diff_tells_adapters_of_other_bases(tmp_path):
    one = adapters()
    base = {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"] + 1}}
    two = jaxlora.split(jaxlora.bind(base, one, check_base=False))[1]
    a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", two)
    rows = {row["path"]: row for row in told("diff", a, b, code=1)["weights"]}
    assert "for other weights" in rows["head/kernel"]["why"]
    assert not rows["encoder/up/kernel"]["differs"]


def test_diff_compares_magnitudes_and_what_is_replaced(tmp_path):
    config = {"magnitude": True, "train": ("bias",)}
    one = adapters(**config)
    assert jaxlora.lora(model)(jaxlora.bind(PARAMS, one), X).shape == (2, 5)
    for field, path in {"magnitude": "head/kernel", "value": "encoder/up/bias"}.items():
        moved = dataclasses.replace(one[path], **{field: getattr(one[path], field) * 1.5})
        a, b = saved(tmp_path / "a", one), saved(tmp_path / "b", one | {path: moved})
        rows = {row["path"]: row["difference"] for row in told("diff", a, b, code=1)["weights"]}
        assert rows == {p: pytest.approx(1 / 3 if p == path else 0, abs=1e-6) for p in one}


def test_formats_of_earlier_versions_are_read():
    folder = GOLDEN.parent / "adapters_format_1"
    report = told("inspect", folder)
    assert report["form"] == "jaxlora, format 1"
    assert report["adapters"]
    told("diff", folder, folder)
