"""Layers of Flax Linen, alone, stacked, scanned and rematerialized."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cases.base import Case, case, normal


def linen(model, *args, **case):
    params = model.init(jax.random.key(0), *args)
    if len(params) > 1:  # other collections are inputs, not parameters
        raise ValueError(f"the case must have parameters only: got {list(params)}")
    return Case(model.apply, params, args, **case)


@case
def linen_dense():
    return linen(nn.Dense(6), normal(1, 5, 8), tokens={"params/kernel": 5})


@case
def linen_dense_in_half_precision():
    return linen(nn.Dense(6, dtype=jnp.bfloat16), normal(1, 5, 8))


@case
def linen_dense_general():
    model = nn.DenseGeneral((3, 2), axis=(-2, -1))
    return linen(model, normal(1, 5, 2, 4), tokens={"params/kernel": 5})


@case
def linen_dense_general_with_batch_axis():
    model = nn.DenseGeneral(6, axis=-1, batch_dims=(0,))
    return linen(model, normal(1, 3, 5, 8), tokens={"params/kernel": 15})


@case
def linen_einsum():
    return linen(nn.Einsum((8, 2, 3), "bd,dnh->bnh"), normal(1, 5, 8), tokens={"params/kernel": 5})


@case
def linen_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    tokens = {f"params/{name}/kernel": 10 for name in ("query", "key", "value", "out")}
    return linen(model, normal(1, 2, 5, 8), tokens=tokens)


@case
def linen_embedding():
    return linen(nn.Embed(11, 8), jnp.arange(6).reshape(2, 3), targets=("embedding",))


class _Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(jnp.tanh(nn.Dense(8, name="dense")(embed(tokens))))


@case
def linen_tied_embedding():
    return linen(_Tied(), jnp.arange(6).reshape(2, 3), targets=("embed", "dense"))


@case
def linen_convolution():
    return linen(nn.Conv(5, (3, 3)), normal(1, 2, 8, 7, 3))


@case
def linen_convolution_strided_and_dilated():
    model = nn.Conv(5, (3,), strides=2, kernel_dilation=2, padding="VALID")
    return linen(model, normal(1, 2, 17, 4), tokens={"params/kernel": 2 * 7})


@case
def linen_convolution_grouped():
    return linen(nn.Conv(6, (3,), feature_group_count=2), normal(1, 2, 9, 4))


@case
def linen_convolution_depthwise():
    return linen(nn.Conv(4, (3,), feature_group_count=4), normal(1, 2, 9, 4))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(8, name="down")(h)


class _Stack(nn.Module):
    remat: bool = False
    scan: bool = True
    unroll: int = 1

    @nn.compact
    def __call__(self, x):
        block = nn.remat(_Block) if self.remat else _Block
        if not self.scan:
            for i in range(3):
                x = block(name=f"block_{i}")(x)
            return x

        def step(module, x, _):
            return module(x), None

        loop = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            unroll=self.unroll,
        )
        return loop(block(name="block"), x, None)[0]


@case
def linen_layers():
    tokens = {f"params/block_{i}/{name}/kernel": 10 for i in range(3) for name in ("up", "down")}
    return linen(_Stack(scan=False), normal(1, 2, 5, 8), tokens=tokens)


@case
def linen_layers_with_remat():
    return linen(_Stack(scan=False, remat=True), normal(1, 2, 5, 8), compiled=True)


@case
def linen_layers_scanned():
    return linen(_Stack(), normal(1, 2, 5, 8), compiled=True)


@case
def linen_layers_scanned_unrolled():
    return linen(_Stack(unroll=3), normal(1, 2, 5, 8), compiled=True)


@case
def linen_layers_scanned_with_remat():
    return linen(_Stack(remat=True), normal(1, 2, 5, 8), compiled=True)
