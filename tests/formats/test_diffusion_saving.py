"""What is written for diffusion models beside factors, and what is not."""

import dataclasses

import diffusion_programs as programs
import numpy as np
import pytest
from diffusion_programs import trained
from folders import equal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlora.formats import Names, diffusion

NAMES, SITES = programs.NAMES, programs.SITES


def test_metadata_of_kohya(tmp_path):
    path, more = tmp_path / "it.safetensors", {"ss_base_model_version": "sd_1.5"}
    diffusion.save(path, trained(), names=NAMES, style="kohya", metadata=more, sites=SITES)
    with safe_open(path, "np") as file:
        said, keys = file.metadata(), set(file.keys())
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "3")
    assert said["ss_base_model_version"] == "sd_1.5"
    assert len(said["sshs_model_hash"]) == 64
    assert "lora_unet_blocks_1_attn_to_q.lora_down.weight" in keys
    assert load_file(path)["lora_te_layers_0_fc1.alpha"].shape == ()


UNSAVED = {
    "kohya's underscores": (
        lambda: trained(),
        {
            "style": "kohya",
            "names": Names(
                ("text_encoder.a.b", "text/fc1[0]"),
                ("text_encoder.a_b", "text/fc1[1]"),
                ("unet.blocks.{i}.attn.to_q", "unet/blocks/q[{i}]"),
            ),
        },
        ValueError,
        "underscores for dots, and two are 'lora_te_a_b'",
    ),
    "a replacement": (
        lambda: trained(train=("unet/conv_in/bias",)),
        {},
        ValueError,
        "'unet/conv_in/bias' is replaced, and files of diffusion models have factors alone",
    ),
    "a name short": (
        lambda: trained(("text/fc2",)),
        {"names": Names(("text_encoder.layers.{i}.fc1", "text/fc1[{i}]"))},
        ValueError,
        "has no name in the file",
    ),
    "a kernel without sites": (
        lambda: trained(("unet/conv_in/kernel",)),
        {"sites": None},
        ValueError,
        "is a kernel, and only the program tells",
    ),
    "several weights": (
        lambda: trained(),
        {"names": Names(("text_encoder.fc1", "text/fc1"), ("unet.q", "unet/blocks/q"))},
        ValueError,
        "is several weights in one module",
    ),
    "a text encoder of an unknown pipeline": (
        lambda: trained(("text/fc1",)),
        {"style": "kohya", "sites": None},
        ValueError,
        "kohya's name of a text encoder depends on what else the pipeline has: give sites",
    ),
    "an alpha of 0": (
        lambda: {
            path: dataclasses.replace(adapter, alpha=0.0) for path, adapter in trained().items()
        },
        {},
        ValueError,
        "the alpha of the adapter .* must be above 0 in a file: got 0.0",
    ),
    "the format": (
        lambda: trained(),
        {"metadata": {"format": "tf"}, "style": "kohya"},
        ValueError,
        "metadata must not have .*format.*, which save writes itself",
    ),
    "a style": (lambda: trained(), {"style": "comfy"}, ValueError, "style must be one of"),
    "metadata": (lambda: trained(), {"metadata": {"a": 1}}, TypeError, "strings by name, or None"),
    "our metadata": (
        lambda: trained(),
        {"metadata": {"lora_adapter_metadata": "{}"}},
        ValueError,
        "metadata must not have .*, which save writes itself",
    ),
}


@pytest.mark.parametrize("what", UNSAVED)
def test_what_a_file_cannot_say_is_refused(what, tmp_path):
    make, options, kind, message = UNSAVED[what]
    with pytest.raises(kind, match=message):
        diffusion.save(
            tmp_path / "it.safetensors", make(), **{"names": NAMES, "sites": SITES} | options
        )
    assert not list(tmp_path.iterdir())


def test_the_path_of_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be that of a file: got .*it/', a folder's"):
        diffusion.save(f"{tmp_path}/it/", trained(), names=NAMES)
    assert not list(tmp_path.iterdir())


def test_only_files_of_adapters_are_replaced(tmp_path):
    path, adapters = tmp_path / "it.safetensors", trained()
    for _ in range(2):
        diffusion.save(path, adapters, names=NAMES)
    equal(diffusion.load(path, sites=SITES, names=NAMES), adapters)
    assert list(tmp_path.iterdir()) == [path]
    (usual := tmp_path / "usual").touch()
    assert path.stat().st_mode == usual.stat().st_mode
    save_file({"model.weight": np.ones((2, 8), np.float32)}, path)
    with pytest.raises(FileExistsError, match="is no file of adapters, and would be lost"):
        diffusion.save(path, adapters, names=NAMES)
    assert load_file(path).keys() == {"model.weight"}
