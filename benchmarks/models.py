"""The model that is measured: a transformer in Flax Linen as users write it, with 3-D inputs."""

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


class Transformer(nn.Module):
    """A stack of blocks.

    Attributes:
        layers: number of blocks.
        heads: attention heads.
        hidden: width of the feed-forward networks.
        scan: whether the blocks are one that is scanned, its weights stacked.
        remat: whether a block is computed again in the backward pass.
    """

    layers: int
    heads: int
    hidden: int
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, time, width)`` for the same."""
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            blocks = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.layers,
            )
            x, _ = blocks(block(self.heads, self.hidden, name="blocks"), x, None)
        else:
            for i in range(self.layers):
                x = block(self.heads, self.hidden, name=f"block_{i}")(x)
        return nn.LayerNorm(name="norm")(x)


TARGETS = ("q", "k", "v", "o", "up", "down")


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
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step
