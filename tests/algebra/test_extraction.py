"""Adapters extracted from a full fine-tuning, against NumPy on the change of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention import PARAMS, X, model
from cases import normal
from dense_products import matrices, nearest
from numpy.testing import assert_allclose

import jaxlora
from jaxlora import algebra

pytestmark = pytest.mark.once


def test_change_of_full_rank_is_extracted_whole():
    sites = jaxlora.find_sites(model, PARAMS, X)
    tuned = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size)).reshape(w.shape), PARAMS)
    found = algebra.extract(PARAMS, tuned, rank=8, sites=sites)
    merged = jaxlora.merge(jaxlora.bind(PARAMS, found.adapters))
    for path in found.adapters:
        assert_allclose(merged[path], tuned[path], rtol=1e-5, atol=1e-5)
        assert found.energy[path] == pytest.approx(1, abs=1e-5)
    assert {path: a.rank for path, a in found.adapters.items()} == {
        "experts": 6,
        "out": 8,
        "query": 8,
    }
    assert found.left == {"bias": pytest.approx(0.1)}
    assert "changed, not adapted" in str(found)


def test_extracted_adapters_are_the_nearest_and_tell_the_energy():
    before = {"w": normal(0, 8, 6), "same": normal(1, 4, 4), "stack": normal(2, 2, 3, 4)}
    after = {"w": normal(3, 8, 6), "same": before["same"], "stack": before["stack"] + 1}
    found = algebra.extract(before, after, rank=2)
    change = np.asarray(after["w"] - before["w"], np.float64)
    assert_allclose(matrices(found.adapters)["w"][0], nearest(change, 2), rtol=1e-4, atol=1e-5)
    s = np.linalg.svd(change, compute_uv=False)
    assert found.energy == {"w": pytest.approx((s[:2] ** 2).sum() / (s**2).sum(), rel=1e-5)}
    assert list(found.left) == ["stack"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: algebra.extract(PARAMS, PARAMS, 0), "at least 1: got 0"),
        (lambda: algebra.extract(PARAMS, PARAMS, 2), "no weight .* has changed"),
        (lambda: algebra.extract(PARAMS, {"query": X}, 2), "must have the same leaves"),
        (
            lambda: algebra.extract({"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 3))}, 1),
            r"'w' must have one shape: got \(2, 2\) and \(2, 3\)",
        ),
        (
            lambda: algebra.extract({"w": jnp.ones((2, 2))}, {"w": jnp.full((2, 2), jnp.inf)}, 1),
            "change of the leaf 'w' is not finite",
        ),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
