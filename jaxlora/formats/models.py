"""Names of known models: the modules of Hugging Face's, and the leaves of JAX's.

Each is for a model's own tree, and for the names of its checkpoint on the hub. Where the tree is a
part of yours, or the model one with a head, `jaxlora.formats.Names.within` adds what stands
before either::

    models.BERT_FLAX.within(file="bert.", tree="params/bert/")

A pair of which the tree has no leaf makes no name, so one list serves models that differ in what
they leave out.
"""

from collections.abc import Iterator, Mapping

from jaxlora.formats.names.mapping import Names

__all__ = ["BERT_FLAX", "GEMMA", "GEMMA_TUNIX", "GPT2_FLAX", "LLAMA_TUNIX"]

_Pairs = Iterator[tuple[str, ...]]


def _weights(pairs: Mapping[str, str], layout: str = "linear") -> _Pairs:
    """Return the pairs of linear layers with their biases."""
    for theirs, ours in pairs.items():
        yield theirs, f"{ours}/kernel", layout
        yield f"{theirs}.bias", f"{ours}/bias"


def _norms(pairs: Mapping[str, str]) -> _Pairs:
    """Return the pairs of normalizations with their biases."""
    for theirs, ours in pairs.items():
        yield theirs, f"{ours}/scale"
        yield f"{theirs}.bias", f"{ours}/bias"


_BERT, _LAYER = "encoder/layer/{i}/", "encoder.layer.{i}."
BERT_FLAX = Names(
    ("embeddings.{table}_embeddings", "embeddings/{table}_embeddings/embedding", "embedding"),
    *_norms(
        {
            "embeddings.LayerNorm": "embeddings/LayerNorm",
            f"{_LAYER}attention.output.LayerNorm": f"{_BERT}attention/output/LayerNorm",
            f"{_LAYER}output.LayerNorm": f"{_BERT}output/LayerNorm",
        }
    ),
    *_weights(
        {
            f"{_LAYER}attention.self.{{projection}}": f"{_BERT}attention/self/{{projection}}",
            f"{_LAYER}attention.output.dense": f"{_BERT}attention/output/dense",
            f"{_LAYER}intermediate.dense": f"{_BERT}intermediate/dense",
            f"{_LAYER}output.dense": f"{_BERT}output/dense",
            "pooler.dense": "pooler/dense",
        }
    ),
)
"""BERT in the tree of transformers' ``FlaxBertModel`` (transformers 4)."""

GPT2_FLAX = Names(
    ("{table}", "{table}/embedding", "embedding"),
    *_norms({"h.{i}.ln_{k}": "h/{i}/ln_{k}", "ln_f": "ln_f"}),
    *_weights({"h.{i}.{block}.c_{name}": "h/{i}/{block}/c_{name}"}, "transposed"),
)
"""GPT-2 in the tree of transformers' ``FlaxGPT2Model`` (transformers 4)."""

_HF, _TUNIX = "model.layers.{i}.", "layers/{i}/"
LLAMA_TUNIX = Names(
    ("model.embed_tokens", "embedder/input_embedding", "embedding"),
    ("model.norm", "final_norm/w"),
    ("lm_head", "lm_head/w"),
    (f"{_HF}{{norm}}_layernorm", f"{_TUNIX}{{norm}}_layernorm/w"),
    (f"{_HF}self_attn.{{p}}_proj", f"{_TUNIX}attn/{{p}}_proj/w"),
    (f"{_HF}self_attn.{{p}}_proj.bias", f"{_TUNIX}attn/{{p}}_bias"),
    (f"{_HF}self_attn.{{p}}_norm", f"{_TUNIX}attn/{{p}}_norm/w"),
    (f"{_HF}mlp.{{p}}_proj", f"{_TUNIX}mlp/{{p}}_proj/kernel"),
    (f"{_HF}mlp.gate", f"{_TUNIX}mlp/router/kernel"),
    (f"{_HF}mlp.experts.{{e}}.{{p}}_proj", f"{_TUNIX}mlp/{{p}}_proj[{{e}}]"),
)
"""Llama, Mistral, Qwen 2 and Qwen 3, also with experts, in the trees of tunix."""

_GEMMA_NORMS = (
    ("input_layernorm", "pre_attention_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("post_attention_layernorm", "post_attn_norm"),  # so in tunix's Gemma 2
    ("pre_feedforward_layernorm", "pre_ffw_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)


def _gemma(layer: str) -> _Pairs:
    """Return the pairs that two trees of Gemma share, but for the name of a layer."""
    yield "model.embed_tokens", "embedder/input_embedding", "embedding"
    yield "model.norm", "final_norm/scale"
    for theirs, ours in _GEMMA_NORMS:
        yield f"{_HF}{theirs}", f"{layer}{ours}/scale"
    yield f"{_HF}self_attn.q_norm", f"{layer}attn/_query_norm/scale"
    yield f"{_HF}self_attn.k_norm", f"{layer}attn/_key_norm/scale"
    yield f"{_HF}self_attn.o_proj", f"{layer}attn/attn_vec_einsum/w"
    yield f"{_HF}self_attn.q_proj", f"{layer}attn/q_einsum/w"
    for i, p in enumerate("kv"):
        yield f"{_HF}self_attn.{p}_proj", f"{layer}attn/kv_einsum/w[{i}]"
    for i, p in enumerate("qkv"):
        yield f"{_HF}self_attn.{p}_proj", f"{layer}attn/qkv_einsum/w[{i}]"


GEMMA_TUNIX = Names(
    *_gemma(_TUNIX),
    (f"{_HF}mlp.{{p}}_proj", f"{_TUNIX}mlp/{{p}}_proj/kernel"),
)
"""Gemma 2 and Gemma 3, without its eyes, in the trees of tunix."""

GEMMA = Names(
    *_gemma("layer_{i}/"),
    (f"{_HF}mlp.gate_proj", "layer_{i}/mlp/gating_einsum[0]"),
    (f"{_HF}mlp.up_proj", "layer_{i}/mlp/gating_einsum[1]"),
    (f"{_HF}mlp.down_proj", "layer_{i}/mlp/linear"),
)
"""Gemma 2 and Gemma 3, without its eyes, in the trees of Google's ``gemma``."""
