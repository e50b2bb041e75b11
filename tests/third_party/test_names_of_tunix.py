"""Names of the models of tunix, against its own readers of checkpoints."""

import importlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.formats import models, safetensors
from third_party.base import relaxed

pytest.importorskip("tunix", reason="google-tunix is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own imports
TOKENS = jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None], None, jnp.ones((1, 4, 4), bool)
COMMON = {
    **{"num_layers": 2, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8},
    "num_kv_heads": 2,
}
LLAMA = COMMON | {"vocab_size": 32, "rope_theta": 10_000, "norm_eps": 1e-6}
GEMMA2 = COMMON | {
    **{"num_embed": 32, "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0},
    **{"use_post_attn_norm": True, "use_post_ffw_norm": True, "sliding_window_size": 4},
}
GEMMA3 = COMMON | {"num_embed": 32, "sliding_window_size": 4, "param_dtype": jnp.float32}
CASES = {
    "llama": ("llama3", "Llama3", "params", LLAMA, models.LLAMA_TUNIX),
    "qwen2": ("qwen2", "Qwen2", "params", LLAMA, models.LLAMA_TUNIX),
    "qwen3": ("qwen3", "Qwen3", "params", LLAMA, models.LLAMA_TUNIX),
    "qwen3_experts": (
        *("qwen3", "Qwen3", "params"),
        LLAMA | {"num_experts": 3, "num_experts_per_tok": 2},
        models.LLAMA_TUNIX,
    ),
    "gemma2": ("gemma", "Gemma", "params_safetensors", GEMMA2, models.GEMMA_TUNIX),
    "gemma2_fused": (
        *("gemma", "Gemma", "params_safetensors"),
        GEMMA2 | {"num_kv_heads": 4},
        models.GEMMA_TUNIX,
    ),
    "gemma3": ("gemma3", "Gemma3", "params_safetensors", GEMMA3, models.GEMMA_TUNIX),
}


def modules(name) -> tuple[Any, Any, Any]:
    """Return the config of a small model, its class, and the module that reads checkpoints."""
    folder, kind, reader, sizes, _ = CASES[name]
    model: Any = importlib.import_module(f"tunix.models.{folder}.model")
    if folder == "gemma":
        kinds = (model.AttentionType.LOCAL_SLIDING, model.AttentionType.GLOBAL)
        sizes = sizes | {"attention_types": kinds}
    config = model.ModelConfig(**sizes)
    return config, getattr(model, kind), importlib.import_module(f"tunix.models.{folder}.{reader}")


@pytest.fixture(autouse=True)
def without_mesh():
    """Let models be made without a mesh, as the import of some does for the process."""
    always_shard = flax.config.flax_always_shard_variable
    with relaxed():
        flax.config.update("flax_always_shard_variable", False)
        yield
    flax.config.update("flax_always_shard_variable", always_shard)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_written_here_is_read_by_tunix(name, tmp_path):
    config, kind, reader = modules(name)
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    tree = state.to_pure_dict()

    def fn(tree, *args):
        own = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(own, tree)
        return nnx.merge(graph, own)(*args)

    sites = jaxlora.find_sites(fn, tree, *TOKENS)
    names, rng = CASES[name][-1], np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), tree)
    safetensors.save(tmp_path / "it", params, names, sites=sites)
    there = reader.create_model_from_safe_tensors(str(tmp_path / "it"), config, dtype=jnp.float32)
    jax.tree.map(assert_array_equal, nnx.state(there).to_pure_dict(), params)
    here = safetensors.load(tmp_path / "it", names, params, sites=sites)
    jax.tree.map(assert_array_equal, here, params)
