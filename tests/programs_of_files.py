"""Programs whose weights a file can name, and how PEFT is asked to adapt each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.formats import Names


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, its weights, and the names that a file has for them.

    Attributes:
        fn: a function of parameters and x.
        params: its parameters.
        x: its input.
        names: what PyTorch calls the leaves.
        sizes: of the vocabulary, or None; how many layers.
    """

    fn: Callable[..., jax.Array]
    params: dict[str, Any]
    x: np.ndarray
    names: Names


def drawn(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape, np.float32) / 2


def plus(x, bias):
    return x + bias.reshape(*[1] * (x.ndim - 1), -1)


def layers():
    """Tokens through a scanned stack of residual layers, and a head."""

    def fn(params, x):
        def layer(x, w):
            return x + jnp.tanh(plus(x @ w["up"], w["up_bias"])) @ w["down"], None

        stacks = {name: params[name] for name in ("up", "up_bias", "down")}
        x, _ = jax.lax.scan(layer, params["embed"][x], stacks)
        return plus(x @ params["head"]["kernel"], params["head"]["bias"])

    params = {
        "embed": drawn(11, 8),
        "up": drawn(3, 8, 12),
        "up_bias": drawn(3, 12),
        "down": drawn(3, 12, 8),
        "head": {"kernel": drawn(8, 5), "bias": drawn(5)},
    }
    names = Names(
        ("embed", "embed", "embedding"),
        ("layers.{i}.up", "up[{i}]"),
        ("layers.{i}.up.bias", "up_bias[{i}]"),
        ("layers.{i}.down", "down[{i}]"),
        ("head", "head/kernel"),
        ("head.bias", "head/bias"),
    )
    return Program(fn, params, np.arange(11)[None], names)


def convolutions():
    """A convolution of an image and one of a sequence, kernels as Flax has them."""

    def fn(params, x):
        one, two = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(
            x, params["image"]["kernel"], (1, 1), "SAME", dimension_numbers=one
        )
        x = jnp.tanh(plus(x, params["image"]["bias"])).mean(1)
        kernel = params["sequence"]["kernel"]
        return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=two)

    params = {
        "image": {"kernel": drawn(3, 3, 2, 5), "bias": drawn(5)},
        "sequence": {"kernel": drawn(3, 5, 4)},
    }
    names = Names(("{c}", "{c}/kernel", "conv"), ("{c}.bias", "{c}/bias"))
    return Program(fn, params, drawn(2, 6, 6, 2), names)


def window_last():
    """A convolution whose kernel lies as PyTorch's."""
    params = {"image": drawn(5, 2, 3, 3)}

    def fn(params, x):
        return jax.lax.conv_general_dilated(x, params["image"], (1, 1), "SAME")

    return Program(fn, params, drawn(2, 2, 6, 6), Names(("image", "image", "conv")))


def volume():
    """A convolution of three dimensions."""

    def fn(params, x):
        layout = ("NDHWC", "DHWIO", "NDHWC")
        return jax.lax.conv_general_dilated(
            x, params["volume"], (1, 1, 1), "SAME", dimension_numbers=layout
        )

    params, names = {"volume": drawn(3, 3, 3, 2, 5)}, Names(("volume", "volume", "conv"))
    return Program(fn, params, drawn(1, 4, 4, 4, 2), names)


def split_heads():
    """Queries and values in one leaf with heads as axes, modules of their own in the file."""

    def fn(params, x):
        q, v = jnp.einsum("td,dqhe->qthe", x, params["qv"])
        return jnp.einsum("the,hed->td", jnp.tanh(q) * v, params["out"])

    names = Names(("q", "qv[:, 0]"), ("v", "qv[:, 1]"), ("out", "out"))
    return Program(fn, {"qv": drawn(8, 2, 3, 4), "out": drawn(3, 4, 8)}, drawn(5, 8), names)


def attention():
    """Attention whose queries, keys and values are one module with the output within it."""

    def fn(params, x):
        q, k, v = jnp.einsum("td,dqhe->qthe", x, params["qkv"])
        chances = jax.nn.softmax(jnp.einsum("the,she->hts", q, k) / 2)
        h = jnp.einsum("hts,she->the", chances, v)
        return jnp.einsum("the,hed->td", h, params["out"])

    names = Names(("mha", "qkv"), ("mha.out_proj", "out"))
    return Program(fn, {"qkv": drawn(8, 3, 2, 4), "out": drawn(2, 4, 8)}, drawn(5, 8), names)


def experts():
    """Layers of experts that are all multiplied at once, a parameter for all of a layer."""

    def fn(params, x):
        def layer(x, w):
            h = jnp.tanh(jnp.einsum("eih,ni->enh", w["up"], x))
            return jnp.einsum("eho,enh->no", w["down"], h), None

        return jax.lax.scan(layer, x, params)[0]

    params = {"up": drawn(2, 3, 8, 6), "down": drawn(2, 3, 6, 8)}
    names = Names(("layers.{i}.experts.up", "up[{i}]"), ("layers.{i}.experts.down", "down[{i}]"))
    return Program(fn, params, drawn(5, 8), names)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and how PEFT is asked to adapt it.

    Attributes:
        program: makes the program.
        config: arguments of the config.
        kind: the class of the config in ``peft``.
    """

    program: Callable[[], Program]
    config: dict[str, Any]
    kind: str = "LoraConfig"


BOTH = ["up", "down"]
CASES = {
    "lora": Case(layers, {"target_modules": BOTH}),
    "stabilized": Case(layers, {"target_modules": BOTH, "use_rslora": True}),
    "magnitudes": Case(layers, {"target_modules": BOTH, "use_dora": True}),
    "embedding": Case(layers, {"target_modules": ["embed", "up"]}),
    "embedding_with_magnitude": Case(layers, {"target_modules": ["embed"], "use_dora": True}),
    "patterns": Case(
        layers,
        {
            "target_modules": [*BOTH, "head"],
            "rank_pattern": {"layers.1.up": 3, "down": 4},
            "alpha_pattern": {"layers.2.*": 7},
        },
    ),
    "some_layers": Case(
        layers,
        {"target_modules": BOTH, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    "expression": Case(layers, {"target_modules": r"layers\.[01]\.(up|down)"}),
    "excluded": Case(layers, {"target_modules": BOTH, "exclude_modules": ["layers.1.up"]}),
    "biases_of_targets": Case(layers, {"target_modules": ["up"], "bias": "lora_only"}),
    "biases": Case(layers, {"target_modules": ["up"], "bias": "all"}),
    "saved_head": Case(layers, {"target_modules": ["up"], "modules_to_save": ["head"]}),
    "saved_layer": Case(layers, {"target_modules": ["up"], "modules_to_save": ["layers.1.down"]}),
    "tokens": Case(
        layers, {"target_modules": ["up"], "trainable_token_indices": {"embed": [3, 1, 7]}}
    ),
    "convolutions": Case(convolutions, {"target_modules": ["image", "sequence"]}),
    "convolutions_with_magnitudes": Case(
        convolutions, {"target_modules": ["image", "sequence"], "use_dora": True}
    ),
    "saved_convolution": Case(
        convolutions, {"target_modules": ["sequence"], "modules_to_save": ["image"]}
    ),
    "window_last": Case(window_last, {"target_modules": ["image"]}),
    "split_heads": Case(split_heads, {"target_modules": ["q", "v", "out"]}),
    "attention": Case(attention, {"target_modules": ["mha"]}),
    "attention_with_pattern": Case(
        attention,
        {"target_modules": ["mha"], "rank_pattern": {"mha": 3}, "alpha_pattern": {"mha": 7}},
    ),
    "volume": Case(volume, {"target_modules": ["volume"]}),
    "experts": Case(
        experts, {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}
    ),
}
# what PEFT has other classes for, and adapters here hold as the factors that it amounts to
_BUDGET = {"init_r": 3, "target_r": 2, "total_step": 4, "tinit": 1, "tfinal": 1}
OTHER_KINDS = {
    "elementwise": Case(layers, {"target_modules": BOTH}, "LoHaConfig"),
    "elementwise_patterns": Case(
        layers,
        {
            "target_modules": BOTH,
            **{"rank_pattern": {"layers.1.up": 3}, "alpha_pattern": {"down": 7}},
        },
        "LoHaConfig",
    ),
    "elementwise_convolutions": Case(
        convolutions, {"target_modules": ["image", "sequence"]}, "LoHaConfig"
    ),
    "elementwise_windows": Case(
        convolutions,
        {"target_modules": ["image", "sequence"], "use_effective_conv2d": True},
        "LoHaConfig",
    ),
    "singular_values": Case(layers, {"target_modules": BOTH, **_BUDGET}, "AdaLoraConfig"),
    "singular_values_of_image": Case(
        convolutions, {"target_modules": ["image"], **_BUDGET}, "AdaLoraConfig"
    ),
    "projections": Case(layers, {"target_modules": BOTH}, "VeraConfig"),
}
