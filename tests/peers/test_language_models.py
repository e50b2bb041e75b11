"""Small models of transformers: their weights read, adapted by PEFT, merged here, read there."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import encoders
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
        fn: the function of a tree and an input.
        tree: shapes of the tree.
        weights: names of the weights in its checkpoint.
        modules: names of its modules.
        targets: what PEFT adapts in every case.
        cases: what else its configs say, by what they are.
        x: the input.
        outputs: what the model returns.
        ignore: what of its checkpoint is not wanted.
    """

    make: Callable[[], Any]
    fn: Callable[..., Any]
    tree: dict[str, Any]
    weights: Names
    modules: Names
    targets: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    x: jax.Array = dataclasses.field(default_factory=lambda: ours.TOKENS)
    outputs: tuple[str, ...] = ("logits",)
    ignore: tuple[str, ...] = ()

    def output(self, model):
        """Return what a model of theirs computes."""
        with torch.no_grad():
            made = model(torch.tensor(np.asarray(self.x)))
        return [made[name].numpy() for name in self.outputs]


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


def bert():
    sizes = {"hidden_size": encoders.WIDTH, "intermediate_size": encoders.HIDDEN}
    counts = {"num_hidden_layers": encoders.LAYERS, "num_attention_heads": encoders.HEADS}
    rows = {"vocab_size": encoders.VOCABULARY, "max_position_embeddings": 12}
    return transformers.BertModel(transformers.BertConfig(**sizes, **counts, **rows))


def resnet():
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2]}
    return transformers.ResNetModel(transformers.ResNetConfig(**sizes, layer_type="basic"))


EVERY = {
    "lora": {},
    "stabilized": {"use_rslora": True},
    "magnitudes": {"use_dora": True},
}
LLAMA = (ours.llama, ours.LLAMA, ours.LLAMA_NAMES, ours.LLAMA_NAMES)
MODELS = {
    "gpt2": Model(
        gpt2,
        *(ours.gpt2, ours.GPT2, ours.GPT2_NAMES, ours.GPT2_NAMES),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        EVERY
        | {
            "an embedding": {"target_modules": ["c_attn", "c_fc", "wpe"]},
            "patterns": {"rank_pattern": {"c_proj": 3}, "alpha_pattern": {"h.1.attn.c_attn": 7}},
            "biases": {"bias": "all"},
            "saved modules": {"modules_to_save": ["ln_f"]},
        },
    ),
    "llama": Model(
        llama,
        *LLAMA,
        {"target_modules": "all-linear"},
        EVERY
        | {
            "patterns": {"use_dora": True, "rank_pattern": {"q_proj": 3}},
            "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
            "saved modules": {
                "target_modules": ["q_proj", "o_proj"],
                "modules_to_save": ["lm_head", "norm"],
            },
            "tokens": {"trainable_token_indices": {"embed_tokens": [7, 2]}},
        },
    ),
    "mixtral": Model(
        mixtral,
        *(ours.llama, ours.MIXTRAL, ours.MIXTRAL_CHECKPOINT, ours.MIXTRAL_NAMES),
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        {"lora": {}, "stabilized": {"use_rslora": True}},
    ),
    "bert": Model(
        bert,
        *(encoders.bert, encoders.BERT, encoders.BERT_NAMES, encoders.BERT_NAMES),
        {"target_modules": ["query", "value"]},
        EVERY
        | {
            "patterns": {"rank_pattern": {"query": 3}, "alpha_pattern": {"encoder.layer.1.*": 7}},
            "an embedding": {"target_modules": ["word_embeddings", "dense"]},
            "biases": {"bias": "all"},
            "biases of targets": {"bias": "lora_only"},
            "saved modules": {"modules_to_save": ["pooler"]},
            "tokens": {"trainable_token_indices": {"word_embeddings": [7, 2]}},
        },
        encoders.TOKENS,
        ("last_hidden_state", "pooler_output"),
    ),
    "resnet": Model(
        resnet,
        *(encoders.resnet, encoders.RESNET, encoders.RESNET_NAMES, encoders.RESNET_NAMES),
        {"target_modules": ["convolution"]},
        EVERY
        | {
            "patterns": {"rank_pattern": {"shortcut.convolution": 3}},
            "biases": {"bias": "all"},
        },
        encoders.IMAGE,
        ("last_hidden_state",),
        (r".*num_batches_tracked",),
    ),
}
CASES = [(name, case) for name, model in MODELS.items() for case in model.cases]


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path):
    theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["wte"]))
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


def normalizing(model):
    """Return a model whose means and variances are not as they started."""
    for name, value in model.named_buffers():
        if "running" in name:
            value.add_(0.1 * torch.rand_like(value))
    return model


def close(got, wanted):
    for one, other in zip(jax.tree.leaves(got), wanted, strict=True):
        assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(("name", "what"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_adapters_travel_both_ways(name, what, tmp_path):
    torch.manual_seed(0)
    case, like = MODELS[name], ours.shapes(MODELS[name].tree)
    theirs = normalizing(moved(case.make()))
    theirs.save_pretrained(tmp_path / "theirs")
    sites = jaxlora.find_sites(case.fn, like, case.x)
    options = {"sites": sites, "ignore": case.ignore}
    params = safetensors.load(tmp_path / "theirs", case.weights, like, **options)
    close(jax.jit(case.fn)(params, case.x), case.output(theirs))

    config = case.targets | {"r": 2, "lora_alpha": 5, "init_lora_weights": False}
    config = peft.LoraConfig(**config | case.cases[what])
    wrapped = moved(peft.get_peft_model(theirs, config))
    wanted = case.output(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapters = folders.load(tmp_path / "adapter", sites=sites, names=case.modules)
    adapted = jaxlora.bind(params, adapters)
    close(jax.jit(jaxlora.lora(case.fn))(adapted, case.x), wanted)

    folders.save(tmp_path / "ours", adapters, names=case.modules, sites=sites)
    again = folders.load(tmp_path / "ours", sites=sites, names=case.modules)
    jax.tree.map(assert_array_equal, again, adapters)
    plain = type(theirs).from_pretrained(tmp_path / "theirs")
    close(case.output(peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()), wanted)
    if what == "lora":
        check_merged(case, adapted, sites, type(theirs), wanted, tmp_path)


def check_merged(case, adapted, sites, kind, wanted, folder):
    """Check that transformers loads merged weights, and computes with them what is wanted."""
    options = {"sites": sites, "max_shard_bytes": 4000}
    safetensors.save(folder / "merged", adapted, case.weights, **options)
    assert len(json.loads((folder / "merged/model.safetensors.index.json").read_text())) == 2
    shutil.copy(folder / "theirs/config.json", folder / "merged")
    close(case.output(kind.from_pretrained(folder / "merged").eval()), wanted)
