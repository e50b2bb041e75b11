"""A small diffusion model of two components as a function of a tree, and its modules' names."""

import jax
import jax.numpy as jnp
from programs_of_files import drawn, plus

import jaxlora
from jaxlora.formats import Names

WIDTH, HEADS, LAYERS = 8, 2, 2
PARAMS = {
    "unet": {
        "conv_in": {"kernel": drawn(3, 3, 2, WIDTH), "bias": drawn(WIDTH)},
        "blocks": {
            **dict(zip("qkv", drawn(3, LAYERS, WIDTH, HEADS, 4), strict=True)),
            "out": drawn(LAYERS, HEADS, 4, WIDTH),
        },
        "proj_out": drawn(1, 1, WIDTH, 2),
    },
    "text": {"fc1": drawn(LAYERS, WIDTH, 6), "fc2": drawn(LAYERS, 6, WIDTH)},
}
IMAGE, TEXT = drawn(2, 4, 4, 2), drawn(2, 5, WIDTH)
PAIRS = (
    ("unet.conv_in", "unet/conv_in/kernel", "conv"),
    *((f"unet.blocks.{{i}}.attn.to_{p}", f"unet/blocks/{p}[{{i}}]") for p in "qkv"),
    ("unet.blocks.{i}.attn.to_out.0", "unet/blocks/out[{i}]"),
    ("unet.proj_out", "unet/proj_out", "conv"),
    ("text_encoder.layers.{i}.{p}", "text/{p}[{i}]"),
)
NAMES = Names(*PAIRS)


def convolved(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def model(params, image, text):
    """Return an image, ``(batch, height, width, channels)``, for one and a text."""
    for fc1, fc2 in zip(params["text"]["fc1"], params["text"]["fc2"], strict=True):
        text = text + jnp.tanh(text @ fc1) @ fc2
    unet = params["unet"]
    x = plus(convolved(image, unet["conv_in"]["kernel"]), unet["conv_in"]["bias"])
    x = x.reshape(len(image), -1, WIDTH)

    def block(x, w):
        q = jnp.einsum("btd,dnh->btnh", x, w["q"])
        k, v = (jnp.einsum("bsd,dnh->bsnh", text, w[name]) for name in "kv")
        chances = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / 2)
        h = jnp.einsum("bnts,bsnh->btnh", chances, v)
        return x + jnp.einsum("btnh,nhd->btd", jnp.tanh(h), w["out"]), None

    x, _ = jax.lax.scan(block, x, unet["blocks"])
    return convolved(x.reshape(*image.shape[:3], -1), unet["proj_out"])


ARGS = IMAGE, TEXT
SITES = jaxlora.find_sites(model, PARAMS, *ARGS)


def trained(targets=("unet/blocks/q", "text/fc1"), **options):
    """Return adapters that have moved."""
    config = jaxlora.LoRAConfig(rank=2, alpha=3, targets=targets, **options)
    key = jax.random.key(0)
    params = jaxlora.init(key, model, PARAMS, *ARGS, config=config)
    _, adapters = jaxlora.split(params)
    return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), adapters)
