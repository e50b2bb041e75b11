"""A BERT encoder in Flax Linen, and how to fill it with weights in Hugging Face's names.

Devlin et al. 2018, arXiv:1810.04805. No module here knows of adapters.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxlora
from jaxlora.formats import Names, safetensors


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


_EMBEDDINGS = {"word": "word", "position": "position", "token_type": "segment"}
_DENSE = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_out",
    "intermediate.dense": "up",
    "output.dense": "down",
}
_NORMS = {
    "embeddings.LayerNorm": "norm",
    "encoder.layer.{i}.attention.output.LayerNorm": "layer_{i}/attention_norm",
    "encoder.layer.{i}.output.LayerNorm": "layer_{i}/norm",
}


def _pairs() -> Iterator[tuple[str, ...]]:
    for theirs, ours in _EMBEDDINGS.items():
        yield f"embeddings.{theirs}_embeddings", f"params/{ours}/embedding", "embedding"
    for theirs, ours in _DENSE.items():
        yield f"encoder.layer.{{i}}.{theirs}", f"params/layer_{{i}}/{ours}/kernel"
        yield f"encoder.layer.{{i}}.{theirs}.bias", f"params/layer_{{i}}/{ours}/bias"
    for theirs, ours in _NORMS.items():
        yield theirs, f"params/{ours}/scale"
        yield f"{theirs}.bias", f"params/{ours}/bias"


NAMES = Names(*_pairs())  # of the tensors of Hugging Face, and their places in `SentenceEncoder`
_UNWANTED = (r"pooler\..*", r"embeddings\.position_ids")


def shapes_and_sites() -> tuple[Any, jaxlora.targets.Sites]:
    """Return the shapes of a `SentenceEncoder`'s parameters, and where adapters can go."""
    model, tokens = SentenceEncoder(), jax.ShapeDtypeStruct((1, 8), jnp.int32)
    mask = jax.ShapeDtypeStruct(tokens.shape, bool)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens, mask)
    return shapes, jaxlora.find_sites(model.apply, shapes, tokens, mask)


def encoder_params(path: Path) -> Any:
    """Return the parameters of a `SentenceEncoder` from a checkpoint of Hugging Face."""
    shapes, sites = shapes_and_sites()
    return safetensors.load(path, NAMES, shapes, sites=sites, ignore=_UNWANTED)["params"]
