"""Small models of transformers: their weights read, adapted by PEFT, merged here, read there."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import jax
import language_models as ours
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora.formats import Names, safetensors
from jaxlora.formats import peft as folders

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    REASON = "install jaxlora[peft] to compare with PEFT"
    torch: Any = pytest.importorskip("torch", reason=REASON)
    peft: Any = pytest.importorskip("peft", reason=REASON)
    transformers: Any = pytest.importorskip("transformers", reason=REASON)

SIZES = {
    "vocab_size": ours.VOCABULARY,
    "hidden_size": ours.WIDTH,
    "intermediate_size": ours.HIDDEN,
    "num_hidden_layers": ours.LAYERS,
    "num_attention_heads": ours.HEADS,
    "num_key_value_heads": ours.GROUPS,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of transformers, and the same as a function.

    Attributes:
        make: returns the model.
        fn: the function of a tree and tokens.
        tree: shapes of the tree.
        weights: names of the weights in its checkpoint.
        modules: names of its modules.
        targets: what PEFT adapts, as arguments of its config.
    """

    make: Callable[[], Any]
    fn: Callable[..., Any]
    tree: dict[str, Any]
    weights: Names
    modules: Names
    targets: dict[str, Any]


def gpt2():
    names = {"n_embd": ours.WIDTH, "n_layer": ours.LAYERS, "n_head": ours.HEADS}
    sizes = {"vocab_size": ours.VOCABULARY, "n_positions": 32, "n_inner": ours.HIDDEN}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**names, **sizes, **ends))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral():
    experts = {"num_local_experts": ours.EXPERTS, "num_experts_per_tok": 2, "rms_norm_eps": 1e-6}
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **experts, **base))


LLAMA = (ours.LLAMA_NAMES, ours.LLAMA_NAMES)
MODELS = {
    "gpt2": Model(
        gpt2,
        *(ours.gpt2, ours.GPT2, ours.GPT2_NAMES, ours.GPT2_NAMES),
        {"target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True},
    ),
    "llama": Model(
        llama,
        *(ours.llama, ours.LLAMA, *LLAMA),
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 3}},
    ),
    "llama_with_a_head": Model(
        llama,
        *(ours.llama, ours.LLAMA, *LLAMA),
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "mixtral": Model(
        mixtral,
        *(ours.llama, ours.MIXTRAL, ours.MIXTRAL_CHECKPOINT, ours.MIXTRAL_NAMES),
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path):
    theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["wte"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    sites = jaxlora.find_sites(ours.gpt2, ours.shapes(ours.GPT2), ours.TOKENS)
    with pytest.raises(ValueError, match="'wte' is looked up and multiplied, and PEFT changes"):
        folders.load(tmp_path, sites=sites, names=ours.GPT2_NAMES)


def moved(model):
    """Return a model in whose weights nothing is as it started."""
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ours.TOKENS))).logits.numpy()


def close(got, wanted):
    assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_weights_and_adapters_travel_both_ways(name, tmp_path):
    torch.manual_seed(0)
    case, like = MODELS[name], ours.shapes(MODELS[name].tree)
    theirs = moved(case.make())
    theirs.save_pretrained(tmp_path / "theirs")
    sites = jaxlora.find_sites(case.fn, like, ours.TOKENS)
    params = safetensors.load(tmp_path / "theirs", case.weights, like, sites=sites)
    close(jax.jit(case.fn)(params, ours.TOKENS), logits(theirs))

    config = peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **case.targets)
    wrapped = moved(peft.get_peft_model(theirs, config))
    wrapped.save_pretrained(tmp_path / "adapter")
    adapters = folders.load(tmp_path / "adapter", sites=sites, names=case.modules)
    adapted = jaxlora.bind(params, adapters)
    close(jax.jit(jaxlora.lora(case.fn))(adapted, ours.TOKENS), logits(wrapped))

    folders.save(tmp_path / "ours", adapters, names=case.modules, sites=sites)
    again = folders.load(tmp_path / "ours", sites=sites, names=case.modules)
    jax.tree.map(assert_array_equal, again, adapters)
    plain = type(theirs).from_pretrained(tmp_path / "theirs")
    close(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()), logits(wrapped))

    options = {"sites": sites, "max_shard_bytes": 4000}
    safetensors.save(tmp_path / "merged", adapted, case.weights, **options)
    assert len(json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())) == 2
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "merged")
    merged = type(theirs).from_pretrained(tmp_path / "merged")
    close(logits(merged.eval()), logits(wrapped))
