"""Two wide layers, large enough for blocks of quantized weights."""

import jax.numpy as jnp
from cases import normal


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def weights(dtype=jnp.float32):
    return {"up": normal(0, 128, 256, dtype=dtype), "down": normal(1, 256, 64, dtype=dtype)}


X = normal(2, 10, 128)
