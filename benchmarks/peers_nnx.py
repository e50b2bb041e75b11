"""The benchmark's model in Flax NNX with `flax.nnx.LoRA` around each layer, as its users write it.

`nnx.LoRA` has no scaling: alpha / rank is taken as 1.
"""

import argparse
from typing import Any

import jax
import models
from flax import nnx
from peers import Variant


class Block(nnx.Module):
    """Attention and a feed-forward network, normalized before."""

    def __init__(self, options: argparse.Namespace, rngs: nnx.Rngs):
        width, hidden = options.width, options.hidden

        def dense(in_: int, out: int) -> nnx.LoRA:
            base = nnx.Linear(in_, out, param_dtype=options.dtype, rngs=rngs)
            draw = nnx.initializers.normal(0.01)
            return nnx.LoRA(
                in_,
                options.rank,
                out,
                base_module=base,
                dtype=options.dtype,
                b_initializer=draw,
                rngs=rngs,
            )

        self.heads = options.heads
        self.attention_norm, self.norm = (
            nnx.LayerNorm(width, param_dtype=options.dtype, rngs=rngs) for _ in range(2)
        )
        self.q, self.k, self.v, self.o = (dense(width, width) for _ in range(4))
        self.up, self.down = dense(width, hidden), dense(hidden, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).reshape(*h.shape[:-1], self.heads, -1) for layer in (self.q, self.k, self.v)
        )
        x = x + self.o(nnx.dot_product_attention(q, k, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    """A stack of blocks."""

    def __init__(self, options: argparse.Namespace, rngs: nnx.Rngs):
        self.blocks = nnx.List(Block(options, rngs) for _ in range(options.layers))
        self.norm = nnx.LayerNorm(options.width, param_dtype=options.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def nnx_lora(options: argparse.Namespace) -> Variant:
    """Return the loss of the model with `flax.nnx.LoRA`, which trains its factors alone."""
    model = Transformer(options, nnx.Rngs(5))
    definition, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors, frozen, x, y) -> Any:
        return models.loss(nnx.merge(definition, factors, frozen)(x), y)

    return loss, nnx.pure(factors), nnx.pure(frozen)
