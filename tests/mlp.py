"""A program of two products with a function between, and what it is compared with."""

import functools

import jax
import jax.numpy as jnp
from cases import Case, normal
from numpy.testing import assert_allclose

import jaxlora

X = normal(1, 5, 8)
WEIGHTS = {"up": normal(0, 8, 12), "down": normal(2, 12, 8)}


def mlp(params, x):
    with jax.named_scope("block/up"):
        h = jnp.tanh(x @ params["up"])
    with jax.named_scope("block/down"):
        return h @ params["down"]


def trained(key):
    """Return its weights with adapters of which no factor is zero."""
    return Case(mlp, WEIGHTS, (X,)).trained(key)


def close(got, wanted):
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)


def of_adapters(fn, base):
    """Return two functions of the adapters, with low-rank and with merged weights."""
    return (
        lambda adapters: jaxlora.lora(fn)(jaxlora.bind(base, adapters), X),
        lambda adapters: fn(jaxlora.merge(jaxlora.bind(base, adapters)), X),
    )


def gradients(fn, params):
    """Return the gradients of the adapters, with low-rank and with merged weights."""
    base, adapters = jaxlora.split(params)
    low_rank, merged = of_adapters(lambda params, x: jnp.sum(jnp.sin(fn(params, x))), base)
    return jax.grad(low_rank)(adapters), jax.grad(merged)(adapters)
