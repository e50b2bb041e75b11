"""SmolLM2-135M-Instruct in Flax Linen, filled from a 4-bit file, with a cache to generate text.

Allal et al. 2025, arXiv:2502.02737: a decoder as Llama's. Its layers are one stack of parameters
that a scan runs through. No module here knows of adapters.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from gguf.quants import dequantize
from tokenizers import decoders, pre_tokenizers

from jaxlora.formats import Names

END = "<|im_end|>"  # the token that ends an answer
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the weights, before they were rounded to 4 bits
NAMES = Names(  # of Hugging Face's modules
    ("model.layers.{i}.self_attn.q_proj", "params/layers/query/kernel[{i}]"),
    ("model.layers.{i}.self_attn.k_proj", "params/layers/key/kernel[{i}]"),
    ("model.layers.{i}.self_attn.v_proj", "params/layers/value/kernel[{i}]"),
    ("model.layers.{i}.self_attn.o_proj", "params/layers/attention_out/kernel[{i}]"),
    ("model.layers.{i}.mlp.gate_proj", "params/layers/gate/kernel[{i}]"),
    ("model.layers.{i}.mlp.up_proj", "params/layers/up/kernel[{i}]"),
    ("model.layers.{i}.mlp.down_proj", "params/layers/down/kernel[{i}]"),
)


class Cache(NamedTuple):
    """Keys and values of the positions so far, ``(layers, batch, length, groups, head width)``."""

    keys: Any
    values: Any


class Positions(NamedTuple):
    """What the positions of the tokens decide, the same in all layers."""

    first: Any  # of the first token
    angles: Any  # of the rotary embedding, (time, head width / 2)
    mask: Any  # which positions each token sees, bool (1, 1, time, positions)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the pairs ``(x[i], x[i + half])`` of heads ``(batch, time, heads, head width)``."""
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    one, two = jnp.split(x, 2, -1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


class Layer(nn.Module):
    """Causal self-attention and a gated feed-forward network, with `LanguageModel`'s attributes."""

    heads: int
    groups: int
    hidden: int
    epsilon: float

    @nn.compact
    def __call__(self, x, cache, positions):
        """Return ``(batch, time, width)`` for the same, and this layer's cache, if it has one."""
        width = x.shape[-1]
        norm = functools.partial(nn.RMSNorm, self.epsilon)
        dense = functools.partial(nn.Dense, use_bias=False)
        h = norm(name="attention_norm")(x)

        def project(name, heads):
            y = dense(heads * width // self.heads, name=name)(h)
            return y.reshape(*y.shape[:-1], heads, -1)

        q = rotate(project("query", self.heads), positions.angles)
        k = rotate(project("key", self.groups), positions.angles)
        v = project("value", self.groups)
        if cache is not None:
            start = (0, positions.first, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.keys, k, start)
            v = jax.lax.dynamic_update_slice(cache.values, v, start)
            cache = Cache(k, v)
        h = jax.nn.dot_product_attention(q, k, v, mask=positions.mask)
        x = x + dense(width, name="attention_out")(h.reshape(x.shape))
        h = norm(name="norm")(x)
        h = nn.silu(dense(self.hidden, name="gate")(h)) * dense(self.hidden, name="up")(h)
        return x + dense(width, name="down")(h), cache


class LanguageModel(nn.Module):
    """A decoder as Llama's, whose embedding also gives the logits; SmolLM2-135M by default.

    Attributes:
        layers: number of layers.
        width: width of the stream.
        heads: heads of the queries.
        groups: heads of keys and values, each for ``heads / groups`` queries.
        hidden: width of the feed-forward network.
        vocabulary: number of token ids.
        rotary_base: base of the rotary embedding's wavelengths.
        epsilon: of the normalizations.
        remat: whether gradients compute each layer anew, to hold less in memory.
    """

    layers: int = 30
    width: int = 576
    heads: int = 9
    groups: int = 3
    hidden: int = 1536
    vocabulary: int = 49152
    rotary_base: float = 1e5
    epsilon: float = 1e-5
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, cache=None, position=0):
        """Return logits ``(batch, time, vocabulary)``, and with a cache also what it has become.

        Args:
            tokens: ids ``(batch, time)``.
            cache: what the tokens see of earlier positions, and where they are put.
            position: of the first token in the cache; all tokens must fit in.
        """
        embed = nn.Embed(self.vocabulary, self.width, name="word")
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.layers,
        )(self.heads, self.groups, self.hidden, self.epsilon, name="layers")
        length = tokens.shape[1] if cache is None else cache.keys.shape[2]
        positions = self._positions(tokens.shape[1], position, length)
        x, new = stack(embed(tokens), cache, positions)
        logits = embed.attend(nn.RMSNorm(self.epsilon, name="norm")(x))
        return logits if cache is None else (logits, new)

    def _positions(self, time, first, length):
        at = first + jnp.arange(time)
        half = self.width // self.heads // 2
        rates = self.rotary_base ** -(jnp.arange(half, dtype=jnp.float32) / half)
        angles = at[:, None].astype(jnp.float32) * rates[None]
        mask = jnp.arange(length)[None] <= at[:, None]
        return Positions(first, angles, mask[None, None])

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return a cache for so many sequences of so many positions."""
        shape = (self.layers, batch, length, self.groups, self.width // self.heads)
        return Cache(jnp.zeros(shape), jnp.zeros(shape))


MODEL = LanguageModel()


@functools.partial(jax.jit, static_argnames=("fn", "steps", "model"))
def generate(
    params: Any,
    fn: Callable[..., Any],
    prompt: jax.Array,
    steps: int,
    model: LanguageModel = MODEL,
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the next tokens one after another, ``(batch, steps)``.

    Compiled for each function, shape of prompt and number of steps. Nothing stops at `END`.

    Args:
        params: the first argument of ``fn``.
        fn: ``model.apply``, or a function of the same arguments.
        prompt: ids ``(batch, time)``, without padding.
        steps: tokens to add.
        model: whose cache it is.
        key: to draw each token by its probability; None takes the likeliest.
    """
    time = prompt.shape[1]
    logits, cache = fn(params, prompt, model.empty_cache(len(prompt), time + steps - 1), 0)

    def choose(logits, position):
        if key is None:
            return logits[:, -1].argmax(-1)
        return jax.random.categorical(jax.random.fold_in(key, position), logits[:, -1])

    def step(carry, position):
        tokens, cache = carry
        logits, cache = fn(params, tokens[:, None], cache, position)
        return (choose(logits, position), cache), tokens

    start = choose(logits, time - 1), cache
    (last, _), found = jax.lax.scan(step, start, time + jnp.arange(steps - 1))
    return jnp.concatenate([found, last[None]]).T


_OF_LAYER = {
    "attn_norm": "attention_norm/scale",
    "attn_q": "query/kernel",
    "attn_k": "key/kernel",
    "attn_v": "value/kernel",
    "attn_output": "attention_out/kernel",
    "ffn_norm": "norm/scale",
    "ffn_gate": "gate/kernel",
    "ffn_up": "up/kernel",
    "ffn_down": "down/kernel",
}


@functools.lru_cache(maxsize=1)
def opened(path: Path) -> gguf.GGUFReader:
    """Return what reads a file (GGUF); the last one is kept, for it takes seconds to open."""
    return gguf.GGUFReader(path)


def load(path: Path, layers: int | None = None) -> Any:
    """Return the parameters of a `LanguageModel` from a file of llama.cpp (GGUF), in float32.

    Args:
        path: of the file.
        layers: use so many, the first ones, for a quick look; None is all.
    """
    reader = opened(path)
    count, heads, groups = (
        reader.fields[f"llama.{name}"].contents()
        for name in ("block_count", "attention.head_count", "attention.head_count_kv")
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name):
        tensor = tensors.pop(f"{name}.weight")
        return dequantize(tensor.data, tensor.tensor_type)

    used = range(count if layers is None else min(layers, count))
    for i in range(len(used), count):
        for name in _OF_LAYER:
            del tensors[f"blk.{i}.{name}.weight"]
    stacks: dict[str, Any] = {}
    for name, place in _OF_LAYER.items():
        weights = np.stack([read(f"blk.{i}.{name}") for i in used])
        if name in ("attn_q", "attn_k"):
            weights = _halves(weights, heads if name == "attn_q" else groups)
        ours, leaf = place.split("/")
        stacks[ours] = {leaf: jnp.asarray(weights.swapaxes(1, 2) if leaf == "kernel" else weights)}
    params = {
        "word": {"embedding": jnp.asarray(read("token_embd"))},
        "layers": stacks,
        "norm": {"scale": jnp.asarray(read("output_norm"))},
    }
    if tensors:
        raise ValueError(f"tensors that a LanguageModel has no place for: {', '.join(tensors)}")
    return {"params": params}


def _halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows ``(layers, out, in)`` of each head in the order that `rotate` needs.

    llama.cpp keeps the two rows of a pair side by side; here, as in Hugging Face's models, all
    first ones of a head come before all second ones.
    """
    layers, out, in_ = weights.shape
    pairs = weights.reshape(layers, heads, out // heads // 2, 2, in_)
    return pairs.swapaxes(2, 3).reshape(weights.shape)


def tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer that a file of SmolLM2 (GGUF) describes."""
    fields = opened(path).fields
    words, kinds, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    vocabulary = {word: i for i, word in enumerate(words)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    found.decoder = decoders.ByteLevel()
    control = gguf.TokenType.CONTROL
    found.add_special_tokens([words[i] for i, kind in enumerate(kinds) if kind == control])
    return found
