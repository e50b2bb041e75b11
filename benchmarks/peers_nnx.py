"""The benchmark's model in Flax NNX with `flax.nnx.LoRA` around each layer, as its users write it.

`nnx.LoRA` has no scaling: alpha / rank is taken as 1.
"""

import argparse
import functools
from typing import Any

import jax
import models
from flax import nnx
from peers import Variant


def dense(options: argparse.Namespace, in_: int, out: int, rngs: nnx.Rngs, bias: bool) -> nnx.LoRA:
    """Return a linear layer with factors, drawn both."""
    like = {"dtype": options.dtype, "param_dtype": options.dtype}
    base = nnx.Linear(in_, out, use_bias=bias, **like, rngs=rngs)
    draw = nnx.initializers.normal(0.01)
    return nnx.LoRA(
        in_, options.rank, out, base_module=base, dtype=options.dtype, b_initializer=draw, rngs=rngs
    )


class Block(nnx.Module):
    """Attention and a feed-forward network, normalized before; see `models.Block`."""

    def __init__(self, options: argparse.Namespace, rngs: nnx.Rngs):
        width, hidden = options.width, options.hidden
        of = functools.partial(dense, options, rngs=rngs, bias=True)
        self.heads = options.heads
        self.attention_norm, self.norm = (
            nnx.LayerNorm(width, param_dtype=options.dtype, rngs=rngs) for _ in range(2)
        )
        self.q, self.k, self.v, self.o = (of(width, width) for _ in range(4))
        self.up, self.down = of(width, hidden), of(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).reshape(*h.shape[:-1], self.heads, -1) for layer in (self.q, self.k, self.v)
        )
        x = x + self.o(nnx.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class GatedBlock(nnx.Module):
    """Grouped attention and a gated feed-forward network; see `models.GatedBlock`."""

    def __init__(self, options: argparse.Namespace, rngs: nnx.Rngs):
        width, hidden = options.width, options.hidden
        of = functools.partial(dense, options, rngs=rngs, bias=False)
        self.per_head = width // options.heads
        grouped = options.groups * self.per_head
        like = {"dtype": options.dtype, "param_dtype": options.dtype}
        self.attention_norm, self.norm = (nnx.RMSNorm(width, **like, rngs=rngs) for _ in range(2))
        self.q, self.o = of(width, width), of(width, width)
        self.k, self.v = of(width, grouped), of(width, grouped)
        self.gate, self.up, self.down = of(width, hidden), of(width, hidden), of(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).reshape(*h.shape[:-1], -1, self.per_head) for layer in (self.q, self.k, self.v)
        )
        x = x + self.o(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        h = self.norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Transformer(nnx.Module):
    """A stack of blocks, with a norm behind those that are not gated."""

    def __init__(self, options: argparse.Namespace, rngs: nnx.Rngs):
        is_gated = options.model == "llama"
        block = GatedBlock if is_gated else Block
        self.blocks = nnx.List(block(options, rngs) for _ in range(options.layers))
        like = {"param_dtype": options.dtype, "rngs": rngs}
        self.norm = None if is_gated else nnx.LayerNorm(options.width, **like)
        self.remat = options.remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""

        def through(block, x):
            return block(x)

        for block in self.blocks:
            x = (nnx.remat(through) if self.remat else through)(block, x)
        return x if self.norm is None else self.norm(x)


def nnx_lora(options: argparse.Namespace) -> Variant:
    """Return the loss of the model with `flax.nnx.LoRA`, which trains its factors alone."""
    model = Transformer(options, nnx.Rngs(5))
    definition, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors, frozen, x, y) -> Any:
        return models.loss(nnx.merge(definition, factors, frozen)(x), y)

    return loss, nnx.pure(factors), nnx.pure(frozen)
