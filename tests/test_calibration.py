"""Moments of inputs against NumPy, and the starts from them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora import initializers

pytestmark = pytest.mark.once

LAYERS = 3
PARAMS: Any = {
    "query": normal(1, 8, 2, 4),
    "key": normal(2, 8, 2, 4),
    "out": normal(3, 2, 4, 8),
    "layers": normal(4, LAYERS, 8, 8),
    "experts": normal(5, 3, 8, 6),
    "table": normal(6, 10, 8),
}
BATCHES = [(normal(10 + i, 2, 5, 8),) for i in range(3)]
TARGETS = ("query", "key", "out", "layers", "experts")


def model(params, x):
    """Return what a small program with every kind of product makes, and its inputs."""
    heads = [jnp.einsum("btd,dnh->btnh", x, params[name]) for name in ("query", "key")]
    mixed = jnp.tanh(heads[0] * heads[1])
    y = jnp.einsum("btnh,nhd->btd", mixed, params["out"])

    @jax.checkpoint
    def layer(y, w):
        return jnp.tanh(y @ w), y

    y, steps = jax.lax.scan(layer, y, params["layers"])
    routed = jnp.stack([y, 2 * y, -y])
    z = jnp.einsum("ebtd,edf->ebtf", routed, params["experts"])
    again = jnp.sin(x) @ params["layers"][0]
    return z, {
        "query": x,
        "out": mixed,
        "layers": (steps, jnp.sin(x)),
        "experts": routed,
        "z": again,
    }


def fn(params, x):
    z, seen = model(params, x)
    return z, seen["z"]


def gram(x, size):
    x = np.asarray(x, np.float64).reshape(-1, size)
    return x.T @ x


def wanted():
    """Return the moments that NumPy finds."""
    total: Any = {name: 0 for name in TARGETS}
    for (x,) in BATCHES:
        _, seen = model(PARAMS, x)
        total["query"] += gram(seen["query"], 8)[None]
        total["out"] += gram(seen["out"], 8)[None]
        steps, others = seen["layers"]
        layers = np.stack([gram(step, 8) for step in steps])
        layers[0] += gram(others, 8)
        total["layers"] += layers
        total["experts"] += np.stack([gram(expert, 8) for expert in seen["experts"]])
    total["key"] = total["query"]
    return total


def moments(targets: Any = TARGETS, batches: Any = BATCHES, **config):
    config = jaxlora.LoRAConfig(rank=2, targets=targets, **config)
    return jaxlora.calibration.moments(fn, PARAMS, batches, config=config)


def init(initializer, targets=TARGETS) -> Any:
    config = jaxlora.LoRAConfig(rank=2, alpha=6.0, targets=targets, initializer=initializer)
    return jaxlora.init(jax.random.key(0), fn, PARAMS, BATCHES[0][0], config=config)


def test_moments_are_those_of_numpy():
    found = moments()
    assert sorted(found) == sorted(TARGETS)
    for name, moment in wanted().items():
        assert_allclose(found[name], moment, rtol=1e-4, atol=1e-4)


def test_moments_of_parts_are_those_of_their_inputs():
    found = moments(targets=("layers[1:3]", "query[0:4]"))
    assert_allclose(found["layers[1:3, :, :]"], wanted()["layers"][1:3], rtol=1e-4, atol=1e-4)
    assert_allclose(found["query[0:4, :, :]"], wanted()["query"][:, :4, :4], rtol=1e-4, atol=1e-4)


def test_eva_starts_at_the_right_singular_vectors_of_all_inputs():
    params = init(initializers.eva(moments()))
    for name, moment in wanted().items():
        node = params[name]
        _, _, vectors = np.linalg.svd(moment)
        a = np.asarray(node.a).reshape(len(moment), -1, 2)
        overlap = np.abs(np.einsum("srd,sdk->srk", vectors[:, :2], a))
        assert_allclose(overlap, np.broadcast_to(np.eye(2), overlap.shape), atol=1e-3)
        assert node.changed == ""
        assert not node.b.any()
        assert_array_equal(node.base, PARAMS[name])


@pytest.mark.parametrize("keep", [False, True])
def test_corda_starts_at_what_matters_for_the_inputs(keep):
    params = init(initializers.corda(moments(), keep=keep))
    for name, moment in wanted().items():
        weight = np.asarray(PARAMS[name], np.float64).reshape(len(moment), 8, -1)
        mean = np.trace(moment, axis1=1, axis2=2)[:, None, None] / 8
        scaled = moment / mean + 0.01 * np.eye(8)
        u, s, v = np.linalg.svd(scaled @ weight, full_matrices=False)
        kept = slice(-2, None) if keep else slice(2)
        product = np.linalg.solve(scaled, u[:, :, kept] * s[:, None, kept] @ v[:, kept])
        found = params[name].delta().reshape(weight.shape)
        assert_allclose(found, product, rtol=1e-2, atol=1e-2 * np.abs(product).max())
        assert params[name].changed == "corda"
    for got, plain in zip(
        jaxlora.lora(fn)(params, *BATCHES[0]), fn(PARAMS, *BATCHES[0]), strict=True
    ):
        assert_allclose(got, plain, rtol=1e-3, atol=1e-3)


def test_flags_and_names_among_the_arguments_are_not_traced():
    def flagged(params, x, is_wide, name):
        return x @ params["w"][name] * (2.0 if is_wide else 1.0)

    params, x = {"w": {"up": normal(0, 8, 4)}, "kind": "dense"}, normal(1, 3, 8)
    config = jaxlora.LoRAConfig(rank=2)
    batches = [(x, True, "up"), (x, False, "up"), (x + 1, True, "up")]
    found = jaxlora.calibration.moments(flagged, params, batches, config=config)["w/up"]
    assert_allclose(found[0], 2 * gram(x, 8) + gram(x + 1, 8), rtol=1e-4)
    slopes = jaxlora.calibration.gradients(
        lambda *args: flagged(*args).sum(), params, batches, config=config
    )["w/up"]
    rows = (2 * x + x + 2 * (x + 1)).sum(0) / 3
    assert_allclose(slopes[0], np.broadcast_to(rows[:, None], (8, 4)), rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_row_came_to_takes_no_rank_and_starts_all_the_same():
    found = moments() | {"experts": moments()["experts"].at[1].set(0)}
    ranks = initializers.eva_ranks(found, 2)
    others = initializers.eva_ranks(moments(), 2)
    assert 0 < ranks["experts"] <= others["experts"]
    params = init(initializers.corda(found))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    broken = found | {"out": found["out"].at[0, 0].set(jnp.nan)}
    for start in (initializers.eva, initializers.corda):
        with pytest.raises(ValueError, match="moments must be finite: 'out' holds NaN or inf"):
            start(broken)


def test_inputs_that_are_not_told_are_refused():
    def routed(params, x):
        return jax.lax.ragged_dot(x, params["experts"], jnp.array([1, 2, 0]))

    config = jaxlora.LoRAConfig(rank=2, targets=("experts",))
    with pytest.raises(ValueError, match=r"'experts' cannot be told: .* by ragged_dot"):
        jaxlora.calibration.moments(routed, PARAMS, [(normal(0, 3, 8),)], config=config)


def test_what_has_no_moments_is_refused():
    def looked_up(params, i):
        return params["table"][i]

    config = jaxlora.LoRAConfig(rank=2, targets=("table",))
    with pytest.raises(ValueError, match="the target 'table' has no inputs"):
        jaxlora.calibration.moments(looked_up, PARAMS, [(jnp.arange(3),)], config=config)
    with pytest.raises(ValueError, match="there is no batch"):
        moments(batches=[])
    some = moments(targets=("query",))
    with pytest.raises(ValueError, match="'eva' has no data for the target 'key'; nearest"):
        init(initializers.eva(some), targets=("key",))
    with pytest.raises(ValueError, match="the data for 'query' must be a matrix for each"):
        init(initializers.eva({"query": jnp.ones((2, 8, 8))}), targets=("query",))


def loss(params, x):
    return sum(jnp.sum(jnp.cos(y)) for y in fn(params, x))


def test_gradients_are_means_over_batches():
    config = jaxlora.LoRAConfig(rank=2, targets=("query", "experts", "layers[1:3]"))
    found = jaxlora.calibration.gradients(loss, PARAMS, BATCHES, config=config)
    mean: Any = jax.tree.map(
        lambda *g: sum(g) / 3, *(jax.grad(loss)(PARAMS, x) for (x,) in BATCHES)
    )
    assert_allclose(found["query"], mean["query"].reshape(1, 8, 8), rtol=1e-4, atol=1e-5)
    assert_allclose(found["experts"], mean["experts"], rtol=1e-4, atol=1e-5)
    assert_allclose(found["layers[1:3, :, :]"], mean["layers"][1:3], rtol=1e-4, atol=1e-5)


def test_lora_ga_starts_along_the_gradient():
    config = jaxlora.LoRAConfig(rank=2, targets=("query", "experts"))
    found = jaxlora.calibration.gradients(loss, PARAMS, BATCHES, config=config)
    params = init(initializers.lora_ga(found), targets=("query", "experts"))
    for name, gradient in found.items():
        out = gradient.shape[-1]
        u, s, v = np.linalg.svd(np.asarray(gradient, np.float64))
        wanted = 3 * u[:, :, :2] * s[:, None, 2:4] @ v[:, 2:4] * out**0.25 / 4
        delta = params[name].delta().reshape(wanted.shape)
        assert_allclose(delta, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    merged = jaxlora.merge(params)
    assert_allclose(merged["query"], PARAMS["query"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="gamma must be finite and positive: got 0"):
        initializers.lora_ga(found, gamma=0)
    config = jaxlora.LoRAConfig(rank=5, targets=("query",), initializer=initializers.lora_ga(found))
    with pytest.raises(ValueError, match="'lora_ga' must return a and b of the shapes"):
        jaxlora.init(jax.random.key(0), fn, PARAMS, BATCHES[0][0], config=config)


def test_moments_of_narrow_inputs_are_summed_wide():
    params, x = {"w": normal(0, 8, 6, dtype=jnp.bfloat16)}, normal(1, 400, 8, dtype=jnp.bfloat16)
    config = jaxlora.LoRAConfig(rank=2)
    found = jaxlora.calibration.moments(lambda p, x: x @ p["w"], params, [(x,)], config=config)["w"]
    assert found.dtype == jnp.float32
    assert_allclose(found[0], gram(x, 8), rtol=1e-5, atol=1e-5)
