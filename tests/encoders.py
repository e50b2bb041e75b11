"""BERT and ResNet as functions of a tree, and what transformers calls their weights.

BERT is in the tree of transformers' own Flax model. ResNet has kernels as Flax has them.
"""

import jax
import jax.numpy as jnp
from language_models import attention, dense, row

from jaxlora.formats import Names, models

WIDTH, HIDDEN, HEADS, LAYERS, VOCABULARY = 16, 24, 4, 2, 19
TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, VOCABULARY)
IMAGE = jax.random.normal(jax.random.key(1), (2, 3, 24, 24))


def normed(x, weights):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-12)
    return x * row(weights["scale"]) + row(weights["bias"])


def bert(params, tokens):
    """Return the states, ``(batch, time, width)``, and the pooled ones, ``(batch, width)``."""
    tables = params["embeddings"]
    positions, kinds = jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens)
    x = tables["word_embeddings"]["embedding"][tokens]
    x = x + tables["position_embeddings"]["embedding"][positions]
    x = normed(x + tables["token_type_embeddings"]["embedding"][kinds], tables["LayerNorm"])
    for layer in params["encoder"]["layer"].values():
        own, out = layer["attention"]["self"], layer["attention"]["output"]
        heads = [dense(x, own[name]) for name in ("query", "key", "value")]
        heads = [y.reshape(*y.shape[:2], HEADS, -1) for y in heads]
        h = attention(*heads, is_causal=False).reshape(x.shape)
        x = normed(x + dense(h, out["dense"]), out["LayerNorm"])
        h = jax.nn.gelu(dense(x, layer["intermediate"]["dense"]), approximate=False)
        x = normed(x + dense(h, layer["output"]["dense"]), layer["output"]["LayerNorm"])
    return x, jnp.tanh(dense(x[:, :1], params["pooler"]["dense"]))[:, 0]


def _dense(*shape):
    return {"kernel": shape, "bias": shape[-1:]}


_NORM = {"scale": (WIDTH,), "bias": (WIDTH,)}
_LAYER = {
    "attention": {
        "self": {name: _dense(WIDTH, WIDTH) for name in ("query", "key", "value")},
        "output": {"dense": _dense(WIDTH, WIDTH), "LayerNorm": _NORM},
    },
    "intermediate": {"dense": _dense(WIDTH, HIDDEN)},
    "output": {"dense": _dense(HIDDEN, WIDTH), "LayerNorm": _NORM},
}
_ROWS = {"word": VOCABULARY, "position": 12, "token_type": 2}
BERT = {
    "embeddings": {
        **{f"{name}_embeddings": {"embedding": (rows, WIDTH)} for name, rows in _ROWS.items()},
        "LayerNorm": _NORM,
    },
    "encoder": {"layer": {str(i): _LAYER for i in range(LAYERS)}},
    "pooler": {"dense": _dense(WIDTH, WIDTH)},
}
BERT_NAMES = models.BERT_FLAX


def convolved(x, weights, stride=1):
    """Return a convolution and its normalization by means and variances of training."""
    kernel = weights["kernel"]
    sides = [(size // 2, size // 2) for size in kernel.shape[:2]]
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), sides, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    channel = {name: weights[name][None, None, None] for name in ("mean", "var", "scale", "bias")}
    x = (x - channel["mean"]) * jax.lax.rsqrt(channel["var"] + 1e-5)
    return x * channel["scale"] + channel["bias"]


def resnet(params, image):
    """Return the last states, ``(batch, channels, height, width)`` as the image is."""
    x = jax.nn.relu(convolved(image.transpose(0, 2, 3, 1), params["stem"], 2))
    window, sides = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), sides)
    for i in range(2):
        for layer in params[f"stage_{i}"].values():
            stride = 2 if "shortcut" in layer else 1
            h = jax.nn.relu(convolved(x, layer["conv_0"], stride))
            rest = convolved(x, layer["shortcut"], 2) if "shortcut" in layer else x
            x = jax.nn.relu(convolved(h, layer["conv_1"]) + rest)
    return x.transpose(0, 3, 1, 2)


def _conv(size, in_, out):
    return {"kernel": (size, size, in_, out)} | {
        name: (out,) for name in ("scale", "bias", "mean", "var")
    }


RESNET = {
    "stem": _conv(7, 3, 4),
    "stage_0": {"layer_0": {"conv_0": _conv(3, 4, 4), "conv_1": _conv(3, 4, 4)}},
    "stage_1": {
        "layer_0": {
            **{"conv_0": _conv(3, 4, 8), "conv_1": _conv(3, 8, 8)},
            "shortcut": _conv(1, 4, 8),
        },
        "layer_1": {"conv_0": _conv(3, 8, 8), "conv_1": _conv(3, 8, 8)},
    },
}


def _pairs(theirs, ours):
    yield f"{theirs}.convolution", f"{ours}/kernel", "conv"
    yield f"{theirs}.normalization", f"{ours}/scale"
    yield f"{theirs}.normalization.bias", f"{ours}/bias"
    yield f"{theirs}.normalization.running_mean", f"{ours}/mean", "tensor"
    yield f"{theirs}.normalization.running_var", f"{ours}/var", "tensor"


_LAYER_OF = "encoder.stages.{i}.layers.{j}", "stage_{i}/layer_{j}"
RESNET_NAMES = Names(
    *_pairs("embedder.embedder", "stem"),
    *_pairs(f"{_LAYER_OF[0]}.shortcut", f"{_LAYER_OF[1]}/shortcut"),
    *_pairs(f"{_LAYER_OF[0]}.layer.{{k}}", f"{_LAYER_OF[1]}/conv_{{k}}"),
)
