"""A program with a query projection, an output projection over heads, and a stack of experts."""

import jax.numpy as jnp
from cases import normal

X = normal(0, 2, 5, 8)
PARAMS = {
    "query": normal(1, 8, 2, 4),
    "out": normal(2, 2, 4, 8),
    "experts": normal(3, 3, 8, 6),
    "bias": normal(4, 6),
}


def model(params, x):
    heads = jnp.einsum("btd,dnh->btnh", x, params["query"])
    y = jnp.einsum("btnh,nhd->btd", jnp.tanh(heads), params["out"])
    y = jnp.einsum("ebtd,edf->ebtf", jnp.stack([y, 2 * y, -y]), params["experts"])
    return y + params["bias"].reshape(1, 1, 1, -1)
