"""Counts of trained parameters, against the numbers of papers and what `jaxlora.init` makes."""

import jax
import jax.numpy as jnp
import pytest

import jaxlora
from jaxlora.planning import count


def matrices(layers, width, *names):
    return {name: (layers, width, width) for name in names}


QUERY_VALUE = ("query", "value")
LLAMA_3_8B = {  # width 4096, hidden 14336, 8 of 32 heads for keys and values, 32 layers
    "mlp": {
        "gate": (32, 4096, 14336),
        "up": (32, 4096, 14336),
        "down": (32, 14336, 4096),
    },
    "attention": {
        "q": (32, 4096, 4096),
        "k": (32, 4096, 1024),
        "v": (32, 4096, 1024),
        "o": (32, 4096, 4096),
    },
    "unembedding": {"head": (4096, 128256)},
}


@pytest.mark.parametrize(
    ("weights", "rank", "wanted"),
    [
        # Hu et al. 2021, arXiv:2106.09685: GPT-3, tables 4 and 5
        (matrices(96, 12288, *QUERY_VALUE), 1, 4_718_592),  # 4.7 M
        (matrices(96, 12288, *QUERY_VALUE), 8, 37_748_736),  # 37.7 M
        (matrices(96, 12288, "query"), 8, 18_874_368),  # 18 M
        (matrices(96, 12288, *QUERY_VALUE), 4, 18_874_368),  # 18 M
        (matrices(96, 12288, "query", "key", "value", "output"), 2, 18_874_368),  # 18 M
        # table 2: RoBERTa base 0.3 M, RoBERTa large 0.8 M, DeBERTa XXL 4.7 M
        (matrices(12, 768, *QUERY_VALUE), 8, 294_912),
        (matrices(24, 1024, *QUERY_VALUE), 8, 786_432),
        (matrices(48, 1536, *QUERY_VALUE), 16, 4_718_592),
        # table 3: GPT-2 medium 0.35 M and large 0.77 M
        (matrices(24, 1024, *QUERY_VALUE), 4, 393_216),
        (matrices(36, 1280, *QUERY_VALUE), 4, 737_280),
        # PEFT's quicktour: mt0-large, 24 layers of attention in the encoder, 48 in the decoder
        (matrices(72, 1024, *QUERY_VALUE), 8, 2_359_296),
        (LLAMA_3_8B["mlp"], 1, 1_769_472),
        (LLAMA_3_8B["attention"], 1, 851_968),
        (LLAMA_3_8B["unembedding"], 1, 132_352),
    ],
)
def test_count_is_that_of_the_papers(weights, rank, wanted):
    assert count(weights, rank) == wanted


@pytest.mark.parametrize("layers", [12, 96])
@pytest.mark.parametrize("rank", [1, 8])
def test_count_of_square_weights_is_two_l_d_r(layers, rank):
    # arXiv:2106.09685, section 4.2 and 5: |Theta| = 2 L d r, L the number of adapted weights
    names = (*QUERY_VALUE, "key")
    assert count(matrices(layers, 768, *names), rank) == 2 * (3 * layers) * 768 * rank


def test_share_of_mt0_large_is_that_of_its_model_card():
    trained = count(matrices(72, 1024, *QUERY_VALUE), 8)
    assert f"{trained / 1_231_940_608:.4%}" == "0.1915%"


def test_checkpoint_of_gpt_3_is_ten_thousand_times_smaller():
    nbytes = 2 * count(matrices(96, 12288, *QUERY_VALUE), 4)
    assert nbytes == 36 * 2**20  # the paper has 35 MB, from 350 GB and "roughly 10,000"
    assert 9_000 < 350e9 / nbytes < 10_000


PARAMS = {
    "embed": jnp.ones((12, 8)),
    "layers": {"w": jnp.ones((3, 8, 6)), "back": jnp.ones((3, 6, 8)), "bias": jnp.ones((3, 8))},
    "head": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(5)},
}
TOKENS = jnp.arange(4)


def model(params, tokens):
    def layer(x, w):
        return jnp.tanh(x @ w["w"]) @ w["back"] + w["bias"][None], None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ("all-linear", "embed")},
        {"targets": ("w",), "magnitude": True},
        {"targets": ("w", "kernel"), "rank_pattern": {"kernel": 3}},
        {"targets": ("w",), "layers": (0, 2)},
        {"targets": ("w[:, :, 0:2]", "w[:, :, 3:6]")},
        {"targets": ("w",), "train": ("head",)},
        {"targets": ("back",), "bias": "all"},
        {"targets": ("kernel",), "bias": "lora_only"},
        {"targets": ("w",), "rows": {"embed": (3, 5)}},
    ],
)
@pytest.mark.filterwarnings("ignore::jaxlora.SkippedWeightWarning")
def test_count_of_sites_is_that_of_what_init_makes(settings, key):
    config = jaxlora.LoRAConfig(rank=2, **settings)
    made = jaxlora.init(key, model, PARAMS, TOKENS, config=config)
    sites = jaxlora.find_sites(model, PARAMS, TOKENS)
    assert count(sites, config) == jaxlora.summary(made).trainable


SITES = jaxlora.find_sites(model, PARAMS, TOKENS)


@pytest.mark.parametrize(
    ("weights", "config", "words"),
    [
        ({}, 1, "weights must be shapes .* got none"),
        ([(4, 4)], 1, "weights must be shapes .* or what jaxlora.find_sites returns: got list"),
        ({"w": 4}, 1, "the shape of 'w' must be ints .* got 4"),
        ({"w": (4,)}, 1, r"the shape of 'w' must be ints \(\*stack, in, out\): got \(4,\)"),
        ({"w": (4, 0)}, 1, "a size of 'w' must be at least 1: got 0"),
        ({"w": (4, 4.0)}, 1, "a size of 'w' must be an int: got 4.0"),
        ({"w": (4, 4)}, 0, "rank must be at least 1: got 0"),
        ({"w": (4, 4)}, jaxlora.LoRAConfig(), "shapes need a rank, an int: got a LoRAConfig"),
        (SITES, 8, "sites need a jaxlora.LoRAConfig, which chooses of them: got 8"),
        (SITES, jaxlora.LoRAConfig(targets=("wq",)), "target 'wq' matches no leaf"),
    ],
)
def test_what_cannot_be_counted_is_told(weights, config, words):
    with pytest.raises((TypeError, ValueError), match=words):
        count(weights, config)
