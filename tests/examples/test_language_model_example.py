"""The decoder of the examples against a forward pass in NumPy, and with adapters."""

from typing import Any

import fetch
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm
from gguf.quants import dequantize

import jaxlora

pytestmark = pytest.mark.once

needs_smollm = pytest.mark.skipif(
    not fetch.has(fetch.SMOLLM_GGUF),
    reason="SmolLM2 is not in the cache: call fetch.smollm() in examples/ once",
)

TINY = smollm.LanguageModel(layers=3, width=24, heads=6, groups=2, hidden=20, vocabulary=31)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 31)
apply = jax.jit(TINY.apply)
apply_lora = jax.jit(jaxlora.lora(TINY.apply, strict=True))


def rotated(x, base):
    """Return heads ``(time, heads, size)`` with pairs of neighbors turned as complex numbers."""
    time, _, size = x.shape
    angles = np.arange(time)[:, None] * base ** (-np.arange(0, size, 2) / size)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def oracle(reader, ids, layers):
    """Return the logits of the first layers of a file in NumPy, with llama.cpp's order of rows."""
    tensors = {t.name: t for t in reader.tensors}
    heads, groups, base, epsilon = (
        reader.fields[f"llama.{name}"].contents()
        for name in (
            *("attention.head_count", "attention.head_count_kv"),
            *("rope.freq_base", "attention.layer_norm_rms_epsilon"),
        )
    )

    def weight(name):
        tensor = tensors[f"{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def normed(x, name):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * weight(name)

    time, embedding = len(ids), weight("token_embd")
    x = embedding[ids]
    for i in range(layers):
        h = normed(x, f"blk.{i}.attn_norm")
        q, k, v = (
            (h @ weight(f"blk.{i}.attn_{name}").T).reshape(time, count, -1)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = rotated(q, base), rotated(k, base)
        k, v = (np.repeat(y, heads // groups, 1) for y in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
        chances = np.tril(np.exp(scores - scores.max(-1, keepdims=True)))
        chances /= chances.sum(-1, keepdims=True)
        h = np.einsum("nts,snh->tnh", chances, v).reshape(time, -1)
        x = x + h @ weight(f"blk.{i}.attn_output").T
        h = normed(x, f"blk.{i}.ffn_norm")
        gate, up = (h @ weight(f"blk.{i}.ffn_{name}").T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"blk.{i}.ffn_down").T
    return normed(x, "output_norm") @ embedding.T


def write(path, model, *more):
    """Write a file with random weights of a model, and more tensors by name."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(model.layers)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.groups)
    writer.add_rope_freq_base(model.rotary_base)
    writer.add_layer_norm_rms_eps(model.epsilon)
    width, keys = model.width, model.width // model.heads * model.groups
    shapes = {
        **{"attn_norm": (width,), "ffn_norm": (width,)},
        **{"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)},
        **{"attn_output": (width, width), "ffn_down": (width, model.hidden)},
        **{"ffn_gate": (model.hidden, width), "ffn_up": (model.hidden, width)},
    }
    layers = range(model.layers)
    named = {f"blk.{i}.{name}": shape for i in layers for name, shape in shapes.items()}
    named |= {"token_embd": (model.vocabulary, width), "output_norm": (width,)}
    for name, shape in (named | dict.fromkeys(more, (2, 2))).items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.4, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weights") / "tiny.gguf", TINY)


@pytest.fixture(scope="module")
def params(file):
    return smollm.load(file)


@pytest.fixture
def adapted(params, key):
    """Return parameters with adapters that change the model."""
    config = jaxlora.LoRAConfig(rank=2, targets=("query", "value"))
    fresh = jaxlora.init(key, TINY.apply, params, TOKENS, config=config)
    base, adapters = jaxlora.split(fresh)
    normal = np.random.default_rng(0).normal
    adapters = jax.tree.map(lambda x: x + normal(0, 0.3, x.shape).astype(x.dtype), adapters)
    return jaxlora.bind(base, adapters)


def in_parts(fn, params, tokens, *sizes):
    """Return logits of tokens that a cache takes in, so many at a time."""
    cache, found, at = TINY.empty_cache(len(tokens), tokens.shape[1] + 2), [], 0
    for size in sizes:
        logits, cache = fn(params, tokens[:, at : at + size], cache, jnp.int32(at))
        found.append(logits)
        at += size
    return np.concatenate(found, 1)


def test_logits_are_those_of_numpy(file, params):
    logits = apply(params, TOKENS)
    for row, ids in zip(logits, TOKENS, strict=True):
        np.testing.assert_allclose(
            row, oracle(gguf.GGUFReader(file), np.asarray(ids), 3), atol=2e-4
        )


def test_parameters_are_those_of_a_new_model(key, params):
    new = jax.eval_shape(TINY.init, key, TOKENS)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(params) == shapes(new)


def test_a_tensor_without_a_place_is_an_error(tmp_path):
    file = write(tmp_path / "untied.gguf", TINY, "output")
    with pytest.raises(ValueError, match=r"has no place for: output\.weight$"):
        smollm.load(file)


def test_layers_that_are_computed_anew_have_the_same_gradients(params):
    def gradients(remat):
        fn: Any = TINY.clone(remat=remat).apply
        return jax.jit(jax.grad(lambda params: jnp.square(fn(params, TOKENS)).mean()))(params)

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        gradients(False),
        gradients(True),
    )


@pytest.mark.parametrize("sizes", [(9,), (6, 1, 1, 1)])
def test_the_cache_changes_no_logits(params, sizes):
    logits = in_parts(apply, params, TOKENS, *sizes)
    np.testing.assert_allclose(logits, apply(params, TOKENS), atol=1e-5)


def test_adapters_are_stacks_for_the_scanned_layers(adapted):
    _, adapters = jaxlora.split(adapted)
    assert {path: (x.a.shape, x.b.shape) for path, x in adapters.items()} == {
        "params/layers/query/kernel": ((3, 24, 2), (3, 2, 24)),
        "params/layers/value/kernel": ((3, 24, 2), (3, 2, 8)),
    }


def test_low_rank_logits_are_those_of_merged_weights(params, adapted):
    expected = apply(jaxlora.merge(adapted), TOKENS)
    assert np.abs(expected - apply(params, TOKENS)).max() > 0.1
    np.testing.assert_allclose(apply_lora(adapted, TOKENS), expected, atol=2e-5)
    found = in_parts(apply_lora, adapted, TOKENS, 6, 1, 1, 1)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_generated_tokens_are_the_likeliest_of_the_whole_sequence(adapted):
    fn, time = jaxlora.lora(TINY.apply, strict=True), TOKENS.shape[1]
    found = smollm.generate(adapted, fn, TOKENS, 6, TINY)
    logits = apply(jaxlora.merge(adapted), jnp.concatenate([TOKENS, found], 1))
    np.testing.assert_array_equal(found, logits[:, time - 1 : -1].argmax(-1))


@pytest.fixture(scope="module")
def pretrained():
    return smollm.load(fetch.smollm())


@pytest.fixture(scope="module")
def tokenizer():
    return smollm.tokenizer(fetch.smollm())


@needs_smollm
class TestSmolLM:
    def test_first_layers_are_those_of_numpy(self, pretrained, tokenizer):
        ids = tokenizer.encode("A fox is 12 miles away.").ids
        first = {**pretrained["params"]}
        first["layers"] = jax.tree.map(lambda x: x[:2], first["layers"])
        model = smollm.LanguageModel(layers=2)
        logits = model.apply({"params": first}, jnp.array([ids]))[0]
        np.testing.assert_allclose(logits, oracle(smollm.opened(fetch.smollm()), ids, 2), atol=1e-3)

    @pytest.mark.parametrize(
        ("prompt", "following"),
        [
            ("The capital of France is", " Paris."),
            (
                "Once upon a time, there was a little girl",
                " named Emma who loved to play in the sun.",
            ),
        ],
    )
    def test_greedy_text_is_the_recorded_one(self, pretrained, tokenizer, prompt, following):
        ids = jnp.array([tokenizer.encode(prompt).ids])
        steps = len(tokenizer.encode(following).ids)
        found = smollm.generate(pretrained, smollm.MODEL.apply, ids, steps)
        assert tokenizer.decode(np.asarray(found[0])) == following

    def test_tokenizer_parts_digits_and_knows_its_special_tokens(self, tokenizer):
        text = f"In 2024, it's 7°{smollm.END}"
        encoded = tokenizer.encode(text)
        assert [x for x in encoded.tokens if x.isdigit()] == ["2", "0", "2", "4", "7"]
        assert encoded.ids[-1] == 2
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
