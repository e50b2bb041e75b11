"""Write trees.json: the leaves of models in JAX, and the tensors of the same in PyTorch.

Each library is in an environment of its own, and is asked for its part alone:

    python tests/peers/make_trees.py torch   # transformers 5 with torch
    python tests/peers/make_trees.py flax    # transformers 4, with flax
    python tests/peers/make_trees.py gemma   # gemma
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax

FILE = Path(__file__).parent.parent / "golden" / "trees.json"
BERT = {
    **{"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 12},
}
GPT2 = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
GEMMA = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}


def shapes(params: Any) -> dict[str, list[int]]:
    """Return the shape of each leaf by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): [*leaf.shape] for path, leaf in leaves}


def of_torch() -> dict[str, dict[str, Any]]:
    """Return the shapes of the tensors of each model by name."""
    t: Any = importlib.import_module("transformers")
    models = {
        "bert": t.BertModel(t.BertConfig(**BERT)),
        "gpt2": t.GPT2Model(t.GPT2Config(**GPT2)),
        "gemma2": t.Gemma2ForCausalLM(t.Gemma2Config(**GEMMA)),
        "gemma3": t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GEMMA)),
    }
    tied = "lm_head.weight"
    return {
        name: {key: list(x.shape) for key, x in model.state_dict().items() if key != tied}
        for name, model in models.items()
    }


def of_flax() -> dict[str, dict[str, Any]]:
    """Return the shapes of the leaves of each model of transformers 4 by path."""
    t: Any = importlib.import_module("transformers")
    models = {
        "bert": t.FlaxBertModel(t.BertConfig(**BERT)),
        "gpt2": t.FlaxGPT2Model(t.GPT2Config(**GPT2)),
    }
    return {name: shapes(model.params) for name, model in models.items()}


def of_gemma() -> dict[str, dict[str, Any]]:
    """Return the shapes of the leaves of each model of Google's gemma by path."""
    config, modules, transformer = (
        importlib.import_module(f"gemma.gm.nn.{name}")
        for name in ("_config", "_modules", "_transformer")
    )
    kinds = (modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL)
    common = {
        **{"num_embed": 32, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8},
        **{"num_kv_heads": 2, "use_post_attn_norm": True, "use_post_ffw_norm": True},
        **{"attention_types": kinds, "sliding_window_size": 64, "final_logit_softcap": None},
    }
    own = {"gemma2": {}, "gemma3": {"use_qk_norm": True, "transpose_gating_einsum": True}}
    found = {}
    for name, more in own.items():
        model = transformer.Transformer(config=config.TransformerConfig(**common, **more))
        tokens = jax.numpy.zeros((1, 4), int)
        found[name] = shapes(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
    return found


def main(library: str) -> None:
    """Ask a library, and keep what it says beside what others have said."""
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    what = "tensors" if library == "torch" else "leaves"
    makers = {"torch": of_torch, "flax": of_flax, "gemma": of_gemma}
    for name, shapes in makers[library]().items():
        known.setdefault(name, {})[what] = shapes
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
