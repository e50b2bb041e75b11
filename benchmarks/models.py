"""The models that are measured, in Flax Linen as users write them, with 3-D inputs."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Block(nn.Module):
    """Attention and a feed-forward network, normalized before.

    Attributes:
        heads: attention heads.
        hidden: width of the feed-forward network.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        width = x.shape[-1]
        h = nn.LayerNorm(name="attention_norm")(x)
        q, k, v = (
            nn.Dense(width, name=name)(h).reshape(*h.shape[:-1], self.heads, -1) for name in "qkv"
        )
        h = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + nn.Dense(width, name="o")(h)
        h = nn.Dense(self.hidden, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(width, name="down")(nn.gelu(h))


class GatedBlock(nn.Module):
    """Grouped attention and a gated feed-forward network, normalized before.

    Attributes:
        heads: attention heads.
        groups: of heads, each with keys and values of its own.
        hidden: width of the feed-forward network.
        dtype: of weights and products.
    """

    heads: int
    groups: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""

        def dense(name, size):
            return nn.Dense(size, use_bias=False, name=name, **like)

        def split(y, heads):
            return y.reshape(*y.shape[:-1], heads, per_head)

        like = {"dtype": self.dtype, "param_dtype": self.dtype}
        width = x.shape[-1]
        per_head = width // self.heads
        h = nn.RMSNorm(name="attention_norm", **like)(x)
        sizes = {"q": self.heads, "k": self.groups, "v": self.groups}
        q, k, v = (split(dense(name, n * per_head)(h), n) for name, n in sizes.items())
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense("o", width)(h)
        h = nn.RMSNorm(name="norm", **like)(x)
        h = nn.silu(dense("gate", self.hidden)(h)) * dense("up", self.hidden)(h)
        return x + dense("down", width)(h)


class Stack(nn.Module):
    """Blocks, one after the other.

    Attributes:
        layers: number of blocks.
        scan: whether the blocks are one that is scanned, its weights stacked.
        remat: whether a block is computed again in the backward pass.
    """

    layers: int
    scan: bool = dataclasses.field(default=False, kw_only=True)
    remat: bool = dataclasses.field(default=False, kw_only=True)

    def through(self, kind: type[nn.Module], sizes: tuple[Any, ...], x: jax.Array) -> jax.Array:
        """Return what the blocks of a kind and of these sizes make of x."""
        block = nn.remat(kind, prevent_cse=not self.scan) if self.remat else kind
        if not self.scan:
            for i in range(self.layers):
                x = block(*sizes, name=f"block_{i}")(x)
            return x
        blocks = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return blocks(block(*sizes, name="blocks"), x, None)[0]


class Transformer(Stack):
    """A transformer whose blocks are as wide as its input.

    Attributes:
        heads: attention heads.
        hidden: width of the feed-forward networks.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        return nn.LayerNorm(name="norm")(self.through(Block, (self.heads, self.hidden), x))


class Llama(Stack):
    """The layers of a Llama; where nothing else is said, of Llama 3 8B.

    Grattafiori et al. 2024, arXiv:2407.21783, table 3.

    Attributes:
        heads: attention heads.
        groups: of heads, each with keys and values of its own.
        hidden: width of the feed-forward networks.
        dtype: of weights and products.
    """

    heads: int = 32
    groups: int = 8
    hidden: int = 14336
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        sizes = (self.heads, self.groups, self.hidden, self.dtype)
        return self.through(GatedBlock, sizes, x)


TARGETS = ("q", "k", "v", "o", "up", "down")  # the products of a transformer
GATED_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # of a Llama
NAMES = ("transformer", "llama")


def of(options: argparse.Namespace) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model that options name, and its products or those of them that are named."""
    how = {"scan": options.scan, "remat": options.remat}
    if options.model == "llama":
        sizes = (options.layers, options.heads, options.groups, options.hidden, options.dtype)
        return Llama(*sizes, **how), options.targets or GATED_TARGETS
    model = Transformer(options.layers, options.heads, options.hidden, **how)
    return model, options.targets or TARGETS


def loss(x: Any, target: jax.Array) -> jax.Array:
    """Return the mean squared error in float32."""
    return jnp.mean((x.astype(jnp.float32) - target.astype(jnp.float32)) ** 2)


def training_step(
    loss: Callable[..., Any], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Return a step, ``(trained, state, frozen, *batch)`` to ``(trained, state, value)``.

    Args:
        loss: of ``(trained, frozen, *batch)``.
        tx: the optimizer.
    """

    def step(trained, state, frozen, *batch):
        value, grads = jax.value_and_grad(loss)(trained, frozen, *batch)
        return *update(tx, trained, state, grads), value

    return step


def update(
    tx: optax.GradientTransformation, trained: Any, state: Any, grads: Any
) -> tuple[Any, Any]:
    """Return what an optimizer makes of what is trained, and its next state."""
    updates, state = tx.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state
