"""Transformers of Penzai: named axes, and parameters taken out of the model by `unbind_params`."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case

from third_party.base import EVERY_WEIGHT, drawn, model

penzai: Any = pytest.importorskip("penzai", reason="penzai is not installed")
gpt_neox: Any = pytest.importorskip("penzai.models.transformer.variants.gpt_neox")
llamalike: Any = pytest.importorskip("penzai.models.transformer.variants.llamalike_common")
pz = penzai.pz


def of_penzai(build, config):
    unbound, parameters = pz.unbind_params(build(config, jax.random.key(0)), freeze=True)
    params = {parameter.label: parameter for parameter in parameters}

    def fn(params, tokens):
        network = pz.bind_variables(unbound, list(params.values()))
        tokens = pz.nx.wrap(tokens).tag("batch", "seq")
        return network(tokens).unwrap("batch", "seq", "vocabulary")

    tokens = jnp.arange(10).reshape(2, 5)
    return Case(fn, drawn(params), (tokens,), targets=EVERY_WEIGHT)


def llama(**choices):
    config = llamalike.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2 if choices.get("use_layer_stack") else 1,
        vocab_size=11,
        **choices,
    )
    return of_penzai(llamalike.build_llamalike_transformer, config)


@model
def penzai_llama_with_layers_stacked():
    return llama(mlp_variant="swiglu", tie_embedder_and_logits=False, use_layer_stack=True)


@model
def penzai_gemma():
    choices = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
    return llama(mlp_variant="geglu_approx", tie_embedder_and_logits=True, **choices)


@model
def penzai_gpt_neox():
    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=1,
        vocab_size=11,
        activation_fn="gelu_approx",
        rope_subset_size=2,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-6,
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    return of_penzai(gpt_neox.build_gpt_neox_transformer, config)
