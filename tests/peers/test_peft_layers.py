"""Adapted layers, against PEFT's value and gradients on the same weights and inputs."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxlora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    REASON = "install jaxlora[peft] to compare with PEFT"
    torch = pytest.importorskip("torch", reason=REASON)
    peft = pytest.importorskip("peft", reason=REASON)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer in both libraries.

    Attributes:
        module: PyTorch's.
        fn: the same, a function of the weight in PyTorch's layout.
        x: input of both.
        a: from the array of PEFT's first factor to ours.
        b: from that of the second.
        names: of the factors in PEFT.
    """

    module: Any
    fn: Any
    x: Any
    a: Any
    b: Any
    names: tuple[str, str] = ("lora_A", "lora_B")


def linear():
    return Layer(
        torch.nn.Linear(8, 12, bias=False),
        lambda params, x: x @ params["w"].T,
        np.random.default_rng(0).standard_normal((4, 5, 8), np.float32),
        lambda a: a.T,
        lambda b: b.T,
    )


def embedding():
    return Layer(
        torch.nn.Embedding(10, 6),
        lambda params, x: params["w"][x],
        np.array([[1, 2, 2], [9, 0, 5]]),
        lambda a: a.T,
        lambda b: b.T,
        ("lora_embedding_A", "lora_embedding_B"),
    )


def convolution():
    def fn(params, x):
        padding, numbers = [(1, 1), (1, 1)], ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(
            x, params["w"], (2, 1), padding, dimension_numbers=numbers
        )

    return Layer(
        torch.nn.Conv2d(3, 8, 3, stride=(2, 1), padding=1, bias=False),
        fn,
        np.random.default_rng(0).standard_normal((2, 3, 6, 7), np.float32),
        lambda a: a.transpose(1, 2, 3, 0),
        lambda b: b[:, :, 0, 0].T,
    )


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def arrays(layer, kind, field):
    """Return the factors of PEFT's layer, or their gradients, in our layout."""

    def read(parameter):
        return getattr(parameter, field).numpy().copy()

    first, second = (getattr(layer, name)["default"] for name in kind.names)
    found = {"a": kind.a(read(getattr(first, "weight", first)))}
    found["b"] = kind.b(read(getattr(second, "weight", second)))
    if "default" in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector["default"].weight
        found["magnitude"] = read(magnitude).reshape(-1)
    return found


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("make", [linear, embedding, convolution])
def test_value_and_gradients_are_equal(make, options):
    torch.manual_seed(0)
    kind = make()
    weight = kind.module.weight.detach().numpy().copy()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], **options)
    model = peft.get_peft_model(Model(kind.module), config)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    y = model(torch.from_numpy(kind.x))
    turn = np.cos(np.arange(y.numel(), dtype=np.float32)).reshape(y.shape)
    (y * torch.from_numpy(turn)).sum().backward()

    config = jaxlora.LoRAConfig(
        rank=3,
        alpha=6,
        targets=("w",),
        rank_stabilized=options.get("use_rslora", False),
        magnitude=options.get("use_dora", False),
    )
    params = {"w": jnp.asarray(weight)}
    params = jaxlora.init(jax.random.key(0), kind.fn, params, kind.x, config=config)
    base, adapters = jaxlora.split(params)
    factors = jax.tree.map(jnp.asarray, arrays(layer, kind, "data"))
    adapters = {"w": dataclasses.replace(adapters["w"], **factors)}

    def loss(adapters):
        y = jaxlora.lora(kind.fn, strict=True)(jaxlora.bind(base, adapters), kind.x)
        return (y * turn).sum(), y

    (_, got), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
    assert_allclose(got, y.detach().numpy(), rtol=1e-4, atol=1e-5)
    for name, wanted in arrays(layer, kind, "grad").items():
        found = getattr(gradients["w"], name)
        assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 12, bias=False)

    def forward(self, x):
        return self.layer(self.embed(x))


def test_rows_that_are_trained_are_trainable_tokens():
    torch.manual_seed(0)
    model, rows = Tokens(), (1, 4)
    x = np.array([[1, 2, 1], [9, 4, 5]])
    layers = {"embed": model.embed, "layer": model.layer}
    weights = {name: jnp.asarray(layer.weight.detach().numpy()) for name, layer in layers.items()}
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["layer"], trainable_token_indices={"embed": list(rows)}
    )
    theirs: Any = peft.get_peft_model(model, config)
    found = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    a, b, delta = (
        next(p for n, p in found.items() if name in n)
        for name in ("lora_A", "lora_B", "trainable_tokens_delta")
    )
    with torch.no_grad():
        for parameter in (a, b, delta):
            parameter.add_(0.3 * torch.randn_like(parameter))
    y = theirs(torch.from_numpy(x))
    turn = np.cos(np.arange(y.numel(), dtype=np.float32)).reshape(y.shape)
    (y * torch.from_numpy(turn)).sum().backward()

    def fn(params, x):
        return params["embed"][x] @ params["layer"].T

    config = jaxlora.LoRAConfig(rank=2, alpha=4, targets=("layer",), rows={"embed": rows})
    params = jaxlora.init(jax.random.key(0), fn, weights, x, config=config)
    base, adapters = jaxlora.split(params)

    def read(field):
        arrays = [getattr(p, field).detach().numpy().copy() for p in (a, b, delta)]
        return {"layer": {"a": arrays[0].T, "b": arrays[1].T}, "embed": {"value": arrays[2]}}

    adapters = {
        name: dataclasses.replace(adapters[name], **jax.tree.map(jnp.asarray, arrays))
        for name, arrays in read("data").items()
    }

    def loss(adapters):
        y = jaxlora.lora(fn, strict=True)(jaxlora.bind(base, adapters), x)
        return (y * turn).sum(), y

    (_, got), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
    assert_allclose(got, y.detach().numpy(), rtol=1e-4, atol=1e-5)
    for name, arrays in read("grad").items():
        for field, wanted in arrays.items():
            assert_allclose(getattr(gradients[name], field), wanted, rtol=1e-4, atol=1e-5)
