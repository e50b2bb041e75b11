"""A BERT encoder in Flax Linen, and how to fill it with weights in Hugging Face's names.

Devlin et al. 2018, arXiv:1810.04805. Nothing here knows of adapters.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each with a normalization after the sum.

    Attributes:
        heads: attention heads.
        hidden: width of the feed-forward network.
    """

    heads: int = 12
    hidden: int = 1536

    @nn.compact
    def __call__(self, x, mask):
        """Return ``(batch, time, width)`` for the same and a bool mask ``(batch, time)``."""
        width = x.shape[-1]

        def project(name):
            h = nn.Dense(width, name=name)(x)
            return h.reshape(*h.shape[:-1], self.heads, -1)  # (batch, time, heads, head width)

        q, k, v = (project(name) for name in ("query", "key", "value"))
        h = nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        h = nn.Dense(width, name="attention_out")(h.reshape(x.shape))
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + h)
        h = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return nn.LayerNorm(1e-12, name="norm")(x + nn.Dense(width, name="down")(h))


class SentenceEncoder(nn.Module):
    """BERT with the mean over tokens as the vector of a sentence, as all-MiniLM-L6-v2.

    Attributes:
        layers: number of layers.
        width: width of the stream.
        vocabulary: number of token ids.
        positions: longest sentence in tokens.
    """

    layers: int = 6
    width: int = 384
    vocabulary: int = 30522
    positions: int = 512

    @nn.compact
    def __call__(self, tokens, mask):
        """Return ``(batch, width)`` for ids ``(batch, time)`` and a bool mask of real tokens."""
        x = nn.Embed(self.vocabulary, self.width, name="word")(tokens)
        positions = jnp.arange(tokens.shape[1])[None]
        x = x + nn.Embed(self.positions, self.width, name="position")(positions)
        x = x + nn.Embed(2, self.width, name="segment")(jnp.zeros_like(tokens))
        x = nn.LayerNorm(1e-12, name="norm")(x)
        for i in range(self.layers):
            x = Layer(name=f"layer_{i}")(x, mask)
        weights = mask[..., None].astype(x.dtype)
        return (x * weights).sum(1) / weights.sum(1)


class Classifier(nn.Module):
    """A sentence encoder and one logit."""

    @nn.compact
    def __call__(self, tokens, mask):
        """Return logits ``(batch,)``."""
        vectors = SentenceEncoder(name="encoder")(tokens, mask)
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="head")(vectors)[..., 0]


_NAMES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "segment": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def encoder_params(weights: Mapping[str, np.ndarray], layers: int = 6) -> dict[str, Any]:
    """Return the parameters of a `SentenceEncoder` from tensors in Hugging Face's names."""

    def module(name):
        weight = weights[f"{name}.weight"]
        if "embeddings." in name and "LayerNorm" not in name:
            return {"embedding": weight}
        bias = weights[f"{name}.bias"]
        if "LayerNorm" in name:
            return {"scale": weight, "bias": bias}
        return {"kernel": weight.T, "bias": bias}  # torch has (out, in)

    params = {ours: module(theirs) for ours, theirs in _NAMES.items()}
    for i in range(layers):
        params[f"layer_{i}"] = {
            ours: module(f"encoder.layer.{i}.{theirs}") for ours, theirs in _LAYER_NAMES.items()
        }
    return params
