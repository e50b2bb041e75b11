"""Quantized weights and adapters over them, against bitsandbytes and PEFT on the same weights."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora import QuantizationConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    REASON = "install jaxlora[peft] to compare with PEFT"
    torch = pytest.importorskip("torch", reason=REASON)
    peft = pytest.importorskip("peft", reason=REASON)
    bnb: Any = pytest.importorskip("bitsandbytes", reason=REASON)
    from peft.utils import loftq_utils

WEIGHT = np.random.default_rng(0).standard_normal((48, 128), np.float32)  # (out, in)
X = np.random.default_rng(1).standard_normal((4, 128), np.float32)
NF4 = QuantizationConfig("nf4", block_size=64, double=False)


def model(params, x):
    return x @ params["layer"].T


def quantized(weight=WEIGHT):
    return jaxlora.quantize(model, {"layer": jnp.asarray(weight)}, X, config=NF4)


def in_torch(weight):
    """Return what a weight quantized by bitsandbytes stands for."""
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return bnb.functional.dequantize_4bit(codes, state)


def test_it_stands_for_the_same():
    wanted = in_torch(torch.from_numpy(WEIGHT)).numpy()
    assert_array_equal(jaxlora.dequantize(quantized())["layer"], wanted)


class Model(torch.nn.Module):
    is_loaded_in_4bit = True

    def __init__(self):
        super().__init__()
        self.layer = bnb.nn.Linear4bit(
            128, 48, bias=False, compute_dtype=torch.float32, compress_statistics=False
        )
        weight = torch.from_numpy(WEIGHT.copy())
        kind = {"quant_type": "nf4", "compress_statistics": False, "blocksize": 64}
        self.layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **kind).to("cpu")

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("magnitude", [False, True], ids=["plain", "magnitude"])
@pytest.mark.filterwarnings("ignore")
def test_value_and_gradients_are_equal(magnitude):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], use_dora=magnitude)
    theirs = peft.get_peft_model(Model(), config)
    layer = theirs.base_model.model.layer
    assert type(layer).__name__ == "Linear4bit"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    y = theirs(torch.from_numpy(X))
    turn = np.cos(np.arange(y.numel(), dtype=np.float32)).reshape(y.shape)
    (y * torch.from_numpy(turn)).sum().backward()

    def factors(field):
        read = {"a": layer.lora_A, "b": layer.lora_B}
        if magnitude:
            read["magnitude"] = layer.lora_magnitude_vector
        found = {n: getattr(group["default"].weight, field) for n, group in read.items()}
        return {n: x.detach().numpy().T.copy() for n, x in found.items()}

    config = jaxlora.LoRAConfig(rank=3, alpha=6, magnitude=magnitude)
    params = jaxlora.init(jax.random.key(0), model, quantized(), X, config=config)
    base, adapters = jaxlora.split(params)
    drawn = {n: jnp.asarray(x) for n, x in factors("data").items()}
    adapters = {"layer": dataclasses.replace(adapters["layer"], **drawn)}

    def loss(adapters):
        y = jaxlora.lora(model, strict=True)(jaxlora.bind(base, adapters), X)
        return (y * turn).sum(), y

    (_, got), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
    assert_allclose(got, y.detach().numpy(), rtol=1e-4, atol=1e-4)
    for name, wanted in factors("grad").items():
        found = getattr(gradients["layer"], name)
        assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_same(iterations):
    """PEFT's own loop needs CUDA: this is it, of the same parts, on the CPU."""
    rows = WEIGHT.copy()
    rows[:4] *= np.array([[16], [12], [8], [6]])  # singular value 4 is then far from 5: rounding
    # does not turn the best product of rank 4
    weight = base = torch.from_numpy(rows)
    product = torch.zeros_like(weight)
    for _ in range(iterations):
        base = in_torch(weight - product)
        parts = loftq_utils._low_rank_decomposition(weight - base, reduced_rank=4)
        product = parts["L"] @ parts["R"]
    start = jaxlora.initializers.loftq({"layer": jnp.asarray(rows)}, iterations=iterations)
    config = jaxlora.LoRAConfig(rank=4, alpha=12, initializer=start)
    params = jaxlora.init(jax.random.key(0), model, quantized(rows), X, config=config)
    close = np.isclose(jaxlora.dequantize(params)["layer"].base, base.numpy(), atol=1e-6)
    assert close.mean() > 1 - 1e-3  # where a later residual lies between two codes
    if iterations == 1:
        assert close.all()
        assert_allclose(params["layer"].delta(), product.numpy(), rtol=1e-4, atol=1e-4)
    merged = np.asarray(jaxlora.merge(params)["layer"])
    errors = [np.linalg.norm(w - rows) for w in (merged, (base + product).numpy())]
    assert_allclose(*errors, rtol=1e-3)
