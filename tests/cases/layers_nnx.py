"""Layers of Flax NNX."""

import jax.numpy as jnp
from flax import nnx

from cases.base import Case, case, normal


def of_nnx(model, *args, **case):
    graphdef, state = nnx.split(model)

    def fn(state, *args):
        return nnx.merge(graphdef, state)(*args)

    return Case(fn, state, args, **case)


class _Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.head = nnx.LinearGeneral(8, (3, 2), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


@case
def nnx_transformer():
    targets = ("embed", "query", "out", "up", "down", "head")
    return of_nnx(_Transformer(nnx.Rngs(0)), jnp.arange(6).reshape(2, 3), targets=targets)


@case
def nnx_convolution():
    return of_nnx(nnx.Conv(3, 5, (3, 3), rngs=nnx.Rngs(0)), normal(1, 2, 6, 7, 3))


class _NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(self.layers, x)


@case
def nnx_layers_scanned_with_remat():
    return of_nnx(_NnxStack(nnx.Rngs(0)), normal(1, 5, 8), compiled=True)
