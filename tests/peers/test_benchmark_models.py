"""The benchmarks compare the same models in Flax Linen, in Flax NNX and in PyTorch."""

import argparse
from typing import Any

import flax.traverse_util
import jax
import models
import numpy as np
import peers_nnx
import pytest
from flax import nnx
from numpy.testing import assert_allclose

REASON = "install jaxlora[peft] to compare with PyTorch"
torch: Any = pytest.importorskip("torch", reason=REASON)
peers_torch: Any = pytest.importorskip("peers_torch", reason=REASON)
SIZES = {"layers": 2, "width": 32, "hidden": 48, "heads": 4, "groups": 2, "rank": 2}


@pytest.fixture(params=models.NAMES)
def options(request):
    rest = {"model": request.param, "scan": False, "remat": False, "targets": None}
    return argparse.Namespace(**SIZES, **rest, dtype="float32")


@pytest.fixture
def found(options):
    """Return parameters of the model in Linen by path, an input and what it makes of that."""
    model, _ = models.of(options)
    x = jax.random.normal(jax.random.key(0), (2, 16, options.width))
    shapes = jax.eval_shape(model.init, jax.random.key(1), x)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.3 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, drawn)
    with jax.numpy_rank_promotion("allow"):
        out = model.apply(params, x)
    return flax.traverse_util.flatten_dict(params["params"]), x, out


def test_torch_computes_what_linen_does(options, found):
    params, x, out = found
    state = {}
    for (*names, name), leaf in params.items():
        kind = "bias" if name == "bias" else "weight"
        path = ".".join([*names, kind]).replace("block_", "blocks.")
        state[path] = torch.tensor(np.array(leaf).T)
    model = peers_torch.Transformer(options)
    model.load_state_dict(state)
    got = model(torch.tensor(np.array(x))).detach()
    assert_allclose(got, out, rtol=1e-4, atol=1e-4)


def test_nnx_computes_what_linen_does(options, found):
    params, x, out = found
    model = peers_nnx.Transformer(options, nnx.Rngs(0))
    for path, leaf in params.items():
        names = "/".join(path).replace("block_", "blocks/").split("/")
        held: Any = model
        for name in names[:-1]:
            held = held[int(name)] if name.isdigit() else getattr(held, name)
        held = held.base_module if isinstance(held, nnx.LoRA) else held
        getattr(held, names[-1])[...] = leaf
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.LoRA):
            layer.lora_b[...] = 0 * layer.lora_b[...]
    with jax.numpy_rank_promotion("allow"):
        got = model(x)
    assert_allclose(got, out, rtol=1e-4, atol=1e-4)
