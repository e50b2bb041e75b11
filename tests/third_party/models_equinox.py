"""Models of Equinox, whose parameters are the arrays of the module itself."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case, normal

from third_party.base import EVERY_WEIGHT, drawn, model

eqx: Any = pytest.importorskip("equinox", reason="equinox is not installed")


def of_equinox(build, *args, call=lambda module, *args: module(*args)):
    shapes = eqx.filter_eval_shape(build, jax.random.key(0))
    shapes, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def fn(params, *args):
        return call(eqx.combine(params, static), *args)

    return Case(fn, drawn(shapes), args, targets=EVERY_WEIGHT)


def each_row(module, x):
    return jax.vmap(module)(x)


def mlp(key):
    return eqx.nn.MLP(8, 8, 12, depth=2, key=key)


@model
def equinox_mlp():
    return of_equinox(mlp, normal(1, 5, 8), call=each_row)


@model
def equinox_attention():
    def build(key):
        return eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, use_output_bias=True, key=key)

    def call(module, x):
        return jax.vmap(lambda x: module(x, x, x))(x)

    return of_equinox(build, normal(1, 2, 5, 8), call=call)


@model
def equinox_recurrent_cells():
    def build(key):
        return {"lstm": eqx.nn.LSTMCell(8, 6, key=key), "gru": eqx.nn.GRUCell(6, 5, key=key)}

    def call(module, x):
        def step(state, x):
            h, c = module["lstm"](x, state[0])
            y = module["gru"](h, state[1])
            return ((h, c), y), y

        state = ((jnp.zeros(6), jnp.zeros(6)), jnp.zeros(5))
        return jax.lax.scan(step, state, x)[1]

    return of_equinox(build, normal(1, 4, 8), call=call)


@model
def equinox_convolutions():
    def build(key):
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 4, 3, padding=1, key=key),
                eqx.nn.Lambda(jax.nn.gelu),
                eqx.nn.Conv2d(4, 6, 3, groups=2, key=key),
                eqx.nn.ConvTranspose2d(6, 4, 3, stride=2, key=key),
            ]
        )

    return of_equinox(build, normal(1, 2, 3, 8, 8), call=each_row)


@model
def equinox_embedding():
    def build(key):
        return {"embed": eqx.nn.Embedding(11, 8, key=key), "head": eqx.nn.Linear(8, 6, key=key)}

    def call(module, tokens):
        return jax.vmap(lambda token: module["head"](module["embed"](token)))(tokens)

    return of_equinox(build, jnp.arange(6), call=call)


@model
def equinox_layers_scanned():
    def build(key):
        return eqx.filter_vmap(mlp)(jax.random.split(key, 3))

    def call(layers, x):
        arrays, static = eqx.partition(layers, eqx.is_array)

        def step(x, layer):
            return x + jax.vmap(eqx.combine(layer, static))(x), None

        return jax.lax.scan(step, x, arrays)[0]

    return of_equinox(build, normal(1, 5, 8), call=call)
