"""Checkpoints of Hugging Face: what is read and written, and what is refused."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import language_models as models
import numpy as np
import pytest
from folders import equal
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import Names, safetensors

MODELS = {
    "gpt2": (models.gpt2, models.GPT2, models.GPT2_NAMES),
    "llama": (models.llama, models.LLAMA, models.LLAMA_NAMES),
    "mixtral": (models.llama, models.MIXTRAL, models.MIXTRAL_CHECKPOINT),
}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def drawn(tree, dtype=jnp.float32):
    leaves, treedef = jax.tree.flatten(models.shapes(tree))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(
        jax.random.normal(key, leaf.shape, dtype) for key, leaf in zip(keys, leaves, strict=True)
    )


def found_sites(name):
    fn, tree, _ = MODELS[name]
    return jaxlora.find_sites(fn, models.shapes(tree), models.TOKENS)


@pytest.mark.parametrize("most", [10**9, 3000])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_bit_for_bit(name, most, tmp_path):
    _, tree, names = MODELS[name]
    params, sites = drawn(tree, jnp.bfloat16), found_sites(name)
    safetensors.save(tmp_path / "it", params, names, sites=sites, max_shard_bytes=most)
    assert (tmp_path / "it" / INDEX).is_file() == (most < 10**9)
    sizes = [file.stat().st_size for file in (tmp_path / "it").glob("*.safetensors")]
    assert max(sizes) < most + 2000  # the header
    for path in (tmp_path / "it", tmp_path / "it" / (INDEX if most < 10**9 else FILE)):
        equal(safetensors.load(path, names, params, sites=sites), params)
    wide = safetensors.load(tmp_path / "it", names, models.shapes(tree), sites=sites)
    equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_weights_lie_in_a_file_as_in_pytorch(tmp_path):
    params, names = drawn(models.LLAMA), models.LLAMA_NAMES
    safetensors.save(tmp_path / "it", params, names, sites=found_sites("llama"))
    found, own = load_file(tmp_path / "it" / FILE), params["layers"]
    for i in range(models.LAYERS):
        at = f"model.layers.{i}"
        q = np.asarray(own["q"][i]).reshape(models.WIDTH, -1)
        o = np.asarray(own["o"][i]).reshape(-1, models.WIDTH)
        assert_array_equal(found[f"{at}.self_attn.q_proj.weight"], q.T)
        assert_array_equal(found[f"{at}.self_attn.o_proj.weight"], o.T)
        assert_array_equal(found[f"{at}.mlp.up_proj.weight"], own["up"][i].T)
        assert_array_equal(found[f"{at}.input_layernorm.weight"], own["norm_1"][i])
    assert_array_equal(found["model.embed_tokens.weight"], params["embed"])
    assert_array_equal(found["lm_head.weight"], params["head"].T)
    assert len(found) == 3 + 9 * models.LAYERS


def adapted(dtype=jnp.float32, scale=1.0):
    config = jaxlora.LoRAConfig(rank=2, targets=("q", "down"))
    key, params = jax.random.key(0), drawn(models.LLAMA)
    tree = jaxlora.init(key, models.llama, params, models.TOKENS, config=config)
    adapters = jax.tree.map(lambda x: x * 0 + scale, jaxlora.split(tree)[1])
    base = jax.tree.map(lambda x: x.astype(dtype), params)
    return jaxlora.bind(base, adapters, check_base=False)


def test_adapted_weights_are_merged(tmp_path):
    tree, sites, names = adapted(), found_sites("llama"), models.LLAMA_NAMES
    safetensors.save(tmp_path / "it", tree, names, sites=sites)
    equal(
        safetensors.load(tmp_path / "it", names, drawn(models.LLAMA), sites=sites),
        jaxlora.merge(tree),
    )


def test_a_product_that_rounding_swallows_is_told(tmp_path):
    tree = adapted(jnp.bfloat16, scale=1e-4)
    with pytest.warns(UserWarning, match=r"changed 0.00% of the elements of 'layers/.*bfloat16 is"):
        safetensors.save(tmp_path / "it", tree, models.LLAMA_NAMES, sites=found_sites("llama"))


def test_quantized_weights_are_dequantized(tmp_path):
    params, names, sites = drawn(models.LLAMA), models.LLAMA_NAMES, found_sites("llama")
    config = jaxlora.QuantizationConfig("int8")
    small = jaxlora.quantize(models.llama, params, models.TOKENS, config=config)
    safetensors.save(tmp_path / "it", small, names, sites=sites)
    equal(safetensors.load(tmp_path / "it", names, params, sites=sites), jaxlora.dequantize(small))


def test_leaves_go_where_they_are_to_be(tmp_path):
    params, names, sites = drawn(models.LLAMA), models.LLAMA_NAMES, found_sites("llama")
    safetensors.save(tmp_path / "it", params, names, sites=sites)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    loaded = safetensors.load(tmp_path / "it", names, like, sites=sites)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {place}


def test_one_tensor_is_in_memory_beside_the_tree(tmp_path):
    names = Names(("{i}", "w[{i}]"))
    params = {"w": np.ones((8, 1024, 1024), np.float32)}
    sites = jaxlora.find_sites(
        lambda params, x: jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0],
        params,
        jnp.ones((2, 1024)),
    )
    safetensors.save(tmp_path / "it", params, names, sites=sites, max_shard_bytes=2**22)
    safetensors.load(tmp_path / "it", names, params, sites=sites)
    tracemalloc.start()
    safetensors.load(tmp_path / "it", names, params, sites=sites)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < params["w"].nbytes + 3 * 2**22  # a tensor, and the bytes it is made of


@pytest.fixture
def saved(tmp_path):
    params, names, sites = drawn(models.LLAMA), models.LLAMA_NAMES, found_sites("llama")
    safetensors.save(tmp_path / "it", params, names, sites=sites)
    return tmp_path / "it"


def change(folder, **arrays):
    found = load_file(folder / FILE) | arrays
    save_file({name: x for name, x in found.items() if x is not None}, folder / FILE)


def load(folder, names=models.LLAMA_NAMES, **options):
    return safetensors.load(
        folder, names, drawn(models.LLAMA), sites=found_sites("llama"), **options
    )


ONE = np.ones(3, np.float32)
HEAD = "lm_head.weight"
REFUSED = {
    "too much": (
        {"rotary.inv_freq": ONE},
        "'rotary.inv_freq' .* has no place, and ignore does not",
    ),
    "too little": (
        {HEAD: None},
        r"every element of the leaf 'head' of shape \(16, 19\) must have a tensor in .*: got 0 of",
    ),
    "a layer short": (
        {"model.layers.1.mlp.up_proj.weight": None},
        r"leaf 'layers/up' of shape \(2, 16, 24\) .*: got 384 of 768, from \['model.layers.0",
    ),
    "another shape": (
        {HEAD: np.ones((16, 19), np.float32)},
        r"'lm_head.weight' .* must have the shape \(19, 16\) for 'head' .*: got \(16, 19\)",
    ),
    "another vector": (
        {"model.norm.weight": np.ones((1, 16), np.float32)},
        r"must have the shape \(16,\) for 'norm'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, saved):
    arrays, message = REFUSED[what]
    change(saved, **arrays)
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_what_is_not_wanted_is_named(saved):
    change(saved, **{"rotary.inv_freq": ONE})
    equal(load(saved, ignore=(r".*\.inv_freq",)), drawn(models.LLAMA))
    with pytest.raises(ValueError, match="ignore must be regular expressions for names"):
        load(saved, ignore=("(",))
    with pytest.raises(TypeError, match="ignore must be regular expressions for names"):
        load(saved, ignore="inv_freq")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("nothing", "is no index of a checkpoint"),
        ("[]", "is no index of a checkpoint"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "must name files beside it: got '../../etc"),
        ('{"weight_map": {"a": "model.safetensors"}}', "must name the same tensors: they differ"),
    ],
)
def test_a_damaged_index_is_refused(index, message, saved):
    (saved / INDEX).write_text(index)
    with pytest.raises(ValueError, match=message):
        load(saved)
    (saved / INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"no file .*model-2.safetensors"):
        load(saved)
    with pytest.raises(FileNotFoundError, match=r"no file .*none"):
        load(saved / "none")


def test_a_leaf_without_a_name_is_not_written(tmp_path):
    params, sites = drawn(models.LLAMA), found_sites("llama")
    with pytest.raises(ValueError, match=r"leaf 'embed' .* must have a name: got 0 of 304"):
        safetensors.save(tmp_path / "it", params, Names(("lm_head", "head")), sites=sites)
    assert not (tmp_path / "it").exists()


def test_other_files_are_not_lost(saved):
    (saved / "config.json").write_text("{}")
    params, names = drawn(models.LLAMA), models.LLAMA_NAMES
    with pytest.raises(FileExistsError, match=r"holds config.json, which would be lost"):
        safetensors.save(saved, params, names, sites=found_sites("llama"))
    with pytest.raises(FileExistsError, match=r"holds something else, which would be lost"):
        safetensors.save(saved / FILE, params, names, sites=found_sites("llama"))


def test_biases_of_heads_and_single_layers_lie_flat(tmp_path):
    def fn(params, x):
        def layer(x, w):
            return x * w["norm"][None] + jnp.einsum("td,dhe->the", x, w["q"]).sum(1) * 0, None

        y = jnp.einsum("td,dhe->the", x, params["q"]) + params["bias"][None]
        return jax.lax.scan(layer, x, params["layers"])[0], y

    params = {
        "q": jnp.ones((8, 2, 4)),
        "bias": jnp.arange(8.0).reshape(2, 4),
        "layers": {"norm": jnp.ones((1, 8)), "q": jnp.ones((1, 8, 2, 8))},
    }
    names = Names(
        ("q", "q"),
        ("q.bias", "bias"),
        ("l.{i}.norm", "layers/norm[{i}]"),
        ("l.{i}.q", "layers/q[{i}]"),
    )
    sites = jaxlora.find_sites(fn, params, jnp.ones((3, 8)))
    safetensors.save(tmp_path / "it", params, names, sites=sites)
    found = load_file(tmp_path / "it" / FILE)
    shapes = {"q.weight": (8, 8), "q.bias": (8,), "l.0.norm.weight": (8,), "l.0.q.weight": (16, 8)}
    assert {name: x.shape for name, x in found.items()} == shapes
    equal(safetensors.load(tmp_path / "it", names, params, sites=sites), params)


def test_what_cannot_be_said_is_refused(saved, tmp_path):
    params, names, sites = drawn(models.LLAMA), models.LLAMA_NAMES, found_sites("llama")
    other = jaxlora.find_sites(lambda params, x: x @ params["w"], {"w": ONE[None].T}, ONE[None])
    with pytest.raises(ValueError, match="sites must be of this tree: the leaf 'embed' has the"):
        safetensors.load(saved, names, params, sites=other)
    change(saved, **{"model.norm.weight": np.full(16, 1e6, np.float32)})
    for dtype in (jnp.float16, jnp.int32):
        like = params | {"norm": jax.ShapeDtypeStruct((16,), dtype)}
        with pytest.raises(ValueError, match=f"float32, cannot be {jnp.dtype(dtype)}, as its leaf"):
            safetensors.load(saved, names, like, sites=sites)
    with pytest.raises(TypeError, match=r"leaf 'norm' must be an array of numbers: got 1\.0"):
        safetensors.load(saved, names, params | {"norm": 1.0}, sites=sites)
    shape = jax.ShapeDtypeStruct((16,), jnp.float32)
    with pytest.raises(TypeError, match="leaf 'norm' must be an array: got a shape"):
        safetensors.save(tmp_path / "x", params | {"norm": shape}, names, sites=sites)
