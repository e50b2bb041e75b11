"""Commands on files of diffusion models, which need neither the model nor names."""

import json
import shutil

import diffusion_programs as programs
import numpy as np
import pytest
from command_line import GOLDEN, adapters, refused, run, saved, told
from numpy.testing import assert_allclose
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jaxlora

pytestmark = pytest.mark.once
FILES = sorted(GOLDEN.with_name("diffusion").glob("*.safetensors"))
LORA, KOHYA = (GOLDEN.with_name("diffusion") / f"{x}.safetensors" for x in ("lora", "lycoris_lora"))
MODEL = """
from diffusion_programs import ARGS, NAMES, PARAMS, model

def example():
    return model, PARAMS, *ARGS
"""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_inspect_counts_what_is_in_a_file(file):
    report = told("inspect", file)
    tensors = load_file(file)
    assert (report["kind"], report["bytes_on_disk"]) == ("diffusion", file.stat().st_size)
    assert report["not_finite"] == report["replaced"] == []
    modules = {name.partition(".lora_")[0].partition(".hada_")[0] for name in tensors}
    modules = {name.removesuffix(".alpha").removesuffix(".dora_scale") for name in modules}
    paths = {row["path"] for row in report["adapters"]}
    assert paths == {f"{name.replace('.', '/')}/kernel" for name in modules}
    if "windows" not in file.stem and "loha" not in file.stem:
        factors = [x.size for name, x in tensors.items() if not name.endswith(".alpha")]
        assert report["parameters"] == sum(factors)


@pytest.mark.parametrize("name", ["lora", "stabilized", "lycoris_lora", "lycoris_lora_stabilized"])
def test_inspect_has_the_norms_that_numpy_finds(name):
    file = LORA.with_stem(name)
    tensors = load_file(file)
    with safe_open(file, "np") as opened:
        said = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for row in told("inspect", file)["adapters"]:
        module = row["path"].removesuffix("/kernel").replace("/", ".")
        if said:
            a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
            component = module.partition(".")[0]
            alpha, rank = (said[f"{component}.{key}"] for key in ("lora_alpha", "r"))
            scaling = alpha / (np.sqrt(rank) if said[f"{component}.use_rslora"] else rank)
        else:
            a, b = (tensors[f"{module}.lora_{x}.weight"] for x in ("down", "up"))
            scaling = float(tensors[f"{module}.alpha"]) / len(a)
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        assert row["norm"] == pytest.approx(np.linalg.norm(scaling * b @ a), rel=1e-5)
        values = np.linalg.svd(scaling * b @ a, compute_uv=False)[: len(a)]
        found = told("spectrum", file)["weights"][row["path"]]["values"]
        assert_allclose(found, values, rtol=1e-4, atol=1e-5)


def test_inspect_says_what_the_header_does(tmp_path):
    assert told("inspect", LORA)["form"] == "a diffusion model, by diffusers"
    assert told("inspect", KOHYA)["form"] == "a diffusion model"
    header = {"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"}
    save_file(load_file(KOHYA), tmp_path / "it.safetensors", header)
    report = told("inspect", tmp_path / "it.safetensors")
    assert report["form"] == "a diffusion model, by networks.lora"
    assert report["base"]["name"] == "sdxl_base_v1-0"
    code, out, _ = run("inspect", KOHYA)
    assert (code, "base: the header names none" in out) == (0, True)


def test_a_folder_of_diffusers_is_its_file(tmp_path):
    shutil.copy(LORA, tmp_path / "pytorch_lora_weights.safetensors")
    assert told("inspect", tmp_path)["adapters"] == told("inspect", LORA)["adapters"]
    assert not told("diff", tmp_path, LORA)["differs"]
    assert told("diff", LORA, LORA.with_stem("patterns"), code=1)["differs"]


def test_nan_in_a_file_is_exit_code_1(tmp_path):
    tensors = load_file(KOHYA)
    name = min(name for name in tensors if name.endswith("lora_up.weight"))
    bad = tensors | {name: np.full_like(tensors[name], np.nan)}
    save_file(bad, tmp_path / "bad.safetensors")
    (path,) = told("inspect", tmp_path / "bad.safetensors", code=1)["not_finite"]
    assert path == name.replace(".lora_up.weight", "/kernel")
    assert "must be finite" in refused("spectrum", tmp_path / "bad.safetensors")


def test_convert_makes_a_folder_of_names_with_dots(tmp_path):
    report = told("convert", LORA, tmp_path / "out")
    assert report["kind"] == "jaxlora"
    assert "unet/blocks/0/attn/to_q/kernel" in report["paths"]
    assert not told("diff", LORA, tmp_path / "out")["differs"]
    told("truncate", tmp_path / "out", tmp_path / "small", "--rank", 1)


def test_convert_with_names_and_a_model_fills_the_tree(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(MODEL)
    given = ("--names", f"{mine}:NAMES", "--model", f"{mine}:example")
    assert "--names is missing" in refused("convert", KOHYA, tmp_path / "out", *given[2:])
    for file in (LORA, KOHYA):
        told("convert", file, tmp_path / "out", *given)
        found = jaxlora.load_adapters(tmp_path / "out", base=programs.PARAMS)
        got = jaxlora.lora(programs.model)(jaxlora.bind(programs.PARAMS, found), *programs.ARGS)
        wanted = np.load(file.with_suffix(".npy"))
        assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_what_a_file_does_not_tell_is_asked_for(tmp_path):
    out = tmp_path / "out"
    assert "'lycoris_blocks_0_attn_to_k', whose name has no dots" in refused("convert", KOHYA, out)
    assert "make one of it with jaxlora convert" in refused("truncate", LORA, out, "--rank", 1)
    assert "make one of it with jaxlora convert" in refused("combine", LORA, LORA, out)
    run_ = saved(tmp_path / "run", adapters())
    assert "is a file of a diffusion model" in refused("combine", run_, LORA, out)
    base = tmp_path / "base.safetensors"
    save_file({"w": np.ones((2, 2), np.float32)}, base)
    assert "got one of Hugging Face and a file of a diffusion" in refused("merge", base, LORA, out)
    assert "is not understood" in refused("inspect", base)
    of_peft = GOLDEN / "lora" / "adapter_model.safetensors"
    assert "give the folder with both" in refused("inspect", of_peft)
    save_file({"x.lora_A.weight": np.ones(3), "x.lora_B.weight": np.ones(3)}, base)
    assert "must have two axes or more: got (3,)" in refused("inspect", base)
    assert not out.exists()
