"""Files of adapters of diffusion models, against diffusers and LyCORIS, both ways."""

import json

import diffusion_programs as programs
import jax
import numpy as np
import pytest
import torch_diffusion
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch_diffusion import lycoris

import jaxlora
from jaxlora.formats import diffusion

ARGS, SITES = programs.ARGS, programs.SITES
PLAIN = np.asarray(programs.model(programs.PARAMS, *ARGS))


def read(path, wanted):
    """Return the adapters of a file, which compute what they are to."""
    assert np.abs(PLAIN - wanted).max() > 1e-2 * np.abs(wanted).max()
    adapters = diffusion.load(path, sites=SITES, names=programs.NAMES)
    params = jaxlora.bind(programs.PARAMS, adapters)
    got = jax.jit(jaxlora.lora(programs.model))(params, *ARGS)
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    return adapters


def loaded(model, path, component):
    with safe_open(path, "np") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    model.load_lora_adapter(load_file(path), prefix=component, metadata=metadata)
    return model


@pytest.mark.parametrize("name", torch_diffusion.OF_DIFFUSERS)
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # of PEFT
def test_a_file_of_diffusers_travels_both_ways(name, tmp_path):
    wanted = torch_diffusion.write_with_diffusers(name, tmp_path)
    adapters = read(tmp_path, wanted)
    ours = tmp_path / "ours.safetensors"
    diffusion.save(ours, adapters, names=programs.NAMES, sites=SITES)
    again = diffusion.load(ours, sites=SITES, names=programs.NAMES)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    jax.tree.map(assert_array_equal, again, adapters)
    unet = loaded(torch_diffusion.UNet(), ours, "unet")
    text_encoder = loaded(torch_diffusion.TextEncoder(), ours, "text_encoder")
    back = torch_diffusion.output(unet, text_encoder)
    assert_allclose(back, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", torch_diffusion.OF_LYCORIS)
def test_a_file_of_lycoris_travels_both_ways(name, style, tmp_path):
    wanted = torch_diffusion.write_with_lycoris(name, tmp_path / "theirs.safetensors")
    adapters = read(tmp_path / "theirs.safetensors", wanted)
    ours = tmp_path / "ours.safetensors"
    diffusion.save(ours, adapters, names=programs.NAMES, sites=SITES, style=style)
    unet = torch_diffusion.UNet()
    if style == "kohya":
        tensors = load_file(ours).items()
        save_file({name.replace("lora_unet_", "lycoris_"): x for name, x in tensors}, ours)
        network, _ = lycoris.create_lycoris_from_weights(1.0, ours, unet)
        network.apply_to()
    else:
        unet = loaded(unet, ours, "unet")
    back = torch_diffusion.output(unet, torch_diffusion.TextEncoder())
    assert_allclose(back, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
