"""Checkpoints at the edges: links, narrow dtypes, trees that are not plain, folders replaced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.formats import Names, peft, safetensors
from jaxlora.formats.peft import config as configs
from jaxlora.formats.safetensors.merging import merge_checkpoint

NAMES = Names(("m.up", "up"), ("m.down", "down"), ("steps", "steps", "tensor"))
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def weights(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "up": jnp.asarray(rng.normal(size=(4, 6)), dtype),
        "down": jnp.asarray(rng.normal(size=(6, 3)), dtype),
    }


X = jnp.ones((2, 4))


def sites(params):
    return jaxlora.find_sites(model, params, X.astype(params["up"].dtype))


def adapted(params, **config):
    config = jaxlora.LoRAConfig(rank=2, **config)
    x = X.astype(params["up"].dtype)
    return jaxlora.init(jax.random.key(0), model, params, x, config=config)


def test_links_to_files_are_read_as_in_the_cache_of_hugging_face(tmp_path):
    params = weights()
    safetensors.save(tmp_path / "made", params, NAMES, sites=sites(params), max_shard_bytes=90)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, file in enumerate(sorted((tmp_path / "made").iterdir())):
        file.rename(tmp_path / "blobs" / f"{i:064x}")
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / f"{i:064x}")
    for path in (tmp_path / "snapshot" / INDEX, tmp_path / "snapshot"):
        found = safetensors.load(path, NAMES, params, sites=sites(params))
        jax.tree.map(assert_array_equal, found, params)
    _, adapters = jaxlora.split(adapted(params))
    given = {"names": NAMES, "sites": sites(params)}
    merge_checkpoint(tmp_path / "snapshot" / INDEX, adapters, tmp_path / "m", **given)
    assert (tmp_path / "m" / FILE).is_file()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array([2**31], np.int64), jnp.int32),
        (np.array([-1], np.int32), jnp.uint32),
        (np.array([300], np.int32), jnp.uint8),
        (np.array([500.0], np.float32), jnp.float8_e4m3fn),
        (np.array([1e30], np.float32), jnp.float16),
    ],
)
def test_numbers_that_a_leaf_cannot_hold_are_refused(value, dtype, tmp_path):
    params, like = weights(), jax.ShapeDtypeStruct((1,), dtype)
    own = {f"m.{name}.weight": np.asarray(w).T.copy() for name, w in params.items()}
    save_file({**own, "steps": value}, tmp_path / FILE)
    tree = {**params, "steps": like}
    found = jaxlora.find_sites(lambda p, x: (model(p, x), p["steps"]), tree, X)
    with pytest.raises(ValueError, match=f"'steps' of .* cannot be {np.dtype(dtype)}"):
        safetensors.load(tmp_path, NAMES, tree, sites=found)
    save_file({**own, "steps": value * 0 + 1}, tmp_path / FILE)
    loaded = safetensors.load(tmp_path, NAMES, tree, sites=found)
    assert loaded["steps"].dtype == dtype
    assert loaded["steps"].astype(jnp.float32) == 1


def test_a_tree_that_is_not_plain_is_refused(tmp_path):
    params = weights()
    safetensors.save(tmp_path / "it", params, NAMES, sites=sites(params))
    config = jaxlora.QuantizationConfig("int8", block_size=2)
    quantized = jaxlora.quantize(model, params, X, config=config)
    wide = {name: np.asarray(w, np.float64) for name, w in params.items()}
    for like, message in (
        (adapted(params), "is adapted already: like of safetensors.load needs a plain tree"),
        (quantized, "of like is quantized: load the weights plain"),
        (wide, "of like is float64, which needs jax_enable_x64"),
    ):
        with pytest.raises(ValueError, match=message):
            safetensors.load(tmp_path / "it", NAMES, like, sites=sites(params))


def test_a_leaf_that_is_trained_in_a_wider_dtype_keeps_its_own(tmp_path):
    params = weights(jnp.bfloat16)
    base, adapters = jaxlora.split(adapted(params, targets=("up",), train=("down",)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) + 0.1, adapters)
    tree = jaxlora.bind(base, wide)
    merged = jaxlora.merge(tree)
    assert {leaf.dtype for leaf in merged.values()} == {np.dtype(jnp.bfloat16)}
    assert_array_equal(
        merged["down"], (params["down"].astype(jnp.float32) + 0.1).astype("bfloat16")
    )
    x = X.astype(jnp.bfloat16)
    assert jaxlora.lora(model, strict=True)(tree, x).dtype == jnp.bfloat16
    safetensors.save(tmp_path / "it", tree, NAMES, sites=sites(params))
    written = load_file(tmp_path / "it" / FILE)
    assert_array_equal(written["m.down.weight"], np.asarray(merged["down"]).T)
    gradient = jax.grad(lambda wide: jaxlora.lora(model)(jaxlora.bind(base, wide), x).sum())(wide)
    assert gradient["down"].value.dtype == jnp.float32


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # of JAX
def test_a_weight_of_64_bits_is_merged_and_written_as_jax_has_it(tmp_path):
    params = {name: np.asarray(w, np.float64) for name, w in weights().items()}
    tree = adapted(params, targets=("up",))
    safetensors.save(tmp_path / "it", tree, NAMES, sites=sites(params))
    written = load_file(tmp_path / "it" / FILE)
    assert written["m.up.weight"].dtype == np.float32
    assert_array_equal(written["m.down.weight"], params["down"].T)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    params = weights()
    tree = adapted(params)
    _, first = jaxlora.split(tree)
    first = jax.tree.map(lambda x: x + 1, first)
    second = jaxlora.algebra.scale(jax.tree.map(lambda x: x + 1, first), 3.0)
    peft.save(tmp_path / "it", first, names=NAMES)
    read, calls = configs.read, []

    def read_and_save(place):
        found = read(place)
        if not calls:
            peft.save(tmp_path / "it", second, names=NAMES)
        calls.append(place)
        return found

    monkeypatch.setattr(configs, "read", read_and_save)
    loaded = peft.load(tmp_path / "it", sites=sites(params), names=NAMES)
    assert len(calls) == 2
    for path, adapter in second.items():
        assert loaded[path].alpha == adapter.alpha
        assert_array_equal(loaded[path].b, adapter.b)
