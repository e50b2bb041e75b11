"""What is done with adapters over quantized weights: merging, starts from them, saving."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from cases import normal
from cases.base import trained as drawn
from numpy.testing import assert_allclose, assert_array_equal
from test_laws import loss
from two_layers import X, model, weights

import jaxlora
from jaxlora import QuantizationConfig
from jaxlora.weights.quantized import values


def test_merge_makes_plain_or_quantizes_again_with_its_error():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    config = jaxlora.LoRAConfig(rank=4, targets=("up",))
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), model, params, X, config=config))
    params = jaxlora.bind(base, drawn(jax.random.key(0), adapters))
    plain, errors = jaxlora.merge(params), jaxlora.merge_error(params)
    delta = params["up"].delta()
    assert_allclose(plain["up"], values(base["up"]) + delta, rtol=1e-6, atol=1e-6)
    assert_allclose(plain["down"], values(base["down"]), rtol=1e-6)
    assert errors["up"] < 1e-6
    again = jaxlora.merge(params, requantize=True)
    errors = jaxlora.merge_error(params, requantize=True)
    assert again["down"] is base["down"]
    assert (again["up"].code, again["up"].dtype) == (base["up"].code, base["up"].dtype)
    assert_allclose(jnp.abs(values(again["up"]) - plain["up"]).max(), errors["up"], rtol=1e-5)
    assert errors["up"] > 0.01


def test_donated_codes_are_deleted():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    config = jaxlora.LoRAConfig(rank=4)
    adapted = jaxlora.init(jax.random.key(0), model, params, X, config=config)
    jaxlora.merge(adapted, donate=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_loftq_comes_nearer_to_the_weights_as_they_were():
    before = weights()
    params = jaxlora.quantize(model, before, X, config=QuantizationConfig())
    errors = [jnp.linalg.norm(jaxlora.dequantize(params)["up"] - before["up"])]
    for iterations in (1, 5):
        start = jaxlora.initializers.loftq(before, iterations=iterations)
        config = jaxlora.LoRAConfig(rank=16, alpha=8, initializer=start)
        made = jaxlora.init(jax.random.key(0), model, params, X, config=config)
        errors.append(jnp.linalg.norm(jaxlora.merge(made)["up"] - before["up"]))
        _, adapters = jaxlora.split(made)
        assert adapters["up"].changed == "loftq"
        with pytest.raises(ValueError, match="'up' was quantized anew for 'loftq'"):
            jaxlora.algebra.rebase({"up": adapters["up"]}, {"up": adapters["up"]}, base=params)
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]
    residual = before["up"] - values(params["up"])
    best = jnp.sqrt(jnp.sum(jnp.linalg.svd(residual)[1][16:] ** 2))  # of any product of this rank
    assert_allclose(errors[1], best, rtol=1e-4)


def test_pissa_then_quantize_comes_nearer_too():
    config = jaxlora.LoRAConfig(rank=8, initializer="pissa")
    before, how = weights(), QuantizationConfig()
    started = jaxlora.init(jax.random.key(0), model, before, X, config=config)
    adapted = jaxlora.quantize(model, started, X, config=how)
    assert_array_equal(adapted["up"].a, started["up"].a)
    plain = jaxlora.dequantize(jaxlora.quantize(model, before, X, config=how))["up"]
    error, of_plain = (
        jnp.linalg.norm(w - before["up"]) for w in (jaxlora.merge(adapted)["up"], plain)
    )
    assert error < 0.95 * of_plain


def test_moments_are_those_of_the_weights_it_stands_for():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    config = jaxlora.LoRAConfig(rank=4)
    found = jaxlora.calibration.moments(model, params, [(X,)], config=config)
    assert_allclose(found["up"][0], X.T @ X, rtol=1e-5, atol=1e-5)
    start = jaxlora.initializers.eva(found)
    config = jaxlora.LoRAConfig(rank=4, initializer=start)
    made = jaxlora.init(jax.random.key(0), model, params, X, config=config)
    assert made["up"].base is params["up"]


def test_saved_adapters_are_for_the_quantized_base(tmp_path):
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    made = jaxlora.init(jax.random.key(0), model, params, X, config=jaxlora.LoRAConfig(rank=4))
    base, adapters = jaxlora.split(made)
    jaxlora.save_adapters(tmp_path / "adapters", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    assert_array_equal(loaded["up"].a, adapters["up"].a)
    with pytest.raises(ValueError, match=r"'up' must be nf4.*got float32"):
        jaxlora.load_adapters(tmp_path / "adapters", base=weights())
    others = jaxlora.quantize(
        model, {"up": -weights()["up"], "down": weights()["down"]}, X, config=QuantizationConfig()
    )
    with pytest.raises(ValueError, match="'up' holds other values"):
        jaxlora.load_adapters(tmp_path / "adapters", base=others)
    with ocp.StandardCheckpointer() as checkpointer:  # the base itself, as any tree of arrays
        checkpointer.save(tmp_path / "base", base)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "base", jax.tree.map(ocp.utils.to_shape_dtype_struct, base)
        )
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(base), strict=True):
        assert_array_equal(x, y)


def test_freeze_leaves_codes_as_they_are():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    params = jaxlora.init(jax.random.key(0), model, params, X, config=jaxlora.LoRAConfig(rank=2))
    tx = jaxlora.freeze(optax.sgd(1.0))
    grads = jax.grad(lambda p: loss(jaxlora.lora(model), p, X), allow_int=True)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):  # an update is added to the codes in int8
        after: Any = optax.apply_updates(params, updates)
    for x, y in zip(*map(jax.tree.leaves, (after["up"].base, params["up"].base)), strict=True):
        assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert (after["up"].b != params["up"].b).all()


def test_merging_under_jit_donates_nothing_that_is_traced():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    params = jaxlora.init(jax.random.key(0), model, params, X, config=jaxlora.LoRAConfig(rank=2))
    merged = jax.jit(lambda params: jaxlora.merge(params, donate=True))(params)
    assert_allclose(merged["up"], jaxlora.dequantize(params)["up"].base, atol=1e-6)


def test_extracted_adapters_make_up_for_the_rounding():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    tuned = {name: w + 0.01 * normal(3, *w.shape) for name, w in weights().items()}
    plain, errors = jaxlora.dequantize(params), []
    for rank in (4, 32, 128):
        found = jaxlora.algebra.extract(params, tuned, rank)
        merged = jaxlora.merge(jaxlora.bind(params, found.adapters))
        errors.append(jnp.linalg.norm(merged["up"] - tuned["up"]))
    assert jnp.linalg.norm(plain["up"] - tuned["up"]) > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4  # of full rank


def test_weights_times_a_number_have_another_fingerprint():
    def digest(params):
        params = jaxlora.quantize(model, params, X, config=QuantizationConfig())
        config = jaxlora.LoRAConfig(rank=2)
        params = jaxlora.init(jax.random.key(0), model, params, X, config=config)
        return jaxlora.split(params)[1]["up"].fingerprint.digest

    larger = jax.tree.map(lambda x: 2 * x, weights())
    assert digest(weights()) == digest(weights())
    assert digest(weights()) != digest(larger)
