"""Adapters scaled, padded and truncated, against NumPy on the dense products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention import PARAMS, X, model
from dense_products import assert_products, matrices, nearest, of_each, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora import algebra

pytestmark = pytest.mark.once


def test_delta_is_what_a_merge_adds():
    base, adapters = trained(0)
    params = jaxlora.bind(base, adapters)
    for path in adapters:
        added = jaxlora.merge(params)[path] - base[path]
        assert_allclose(algebra.delta(params, path), added, rtol=1e-5, atol=1e-5)


def test_scaled_product_is_scaled_also_by_a_traced_number():
    _, adapters = trained(0)
    wanted = of_each(lambda product: -0.3 * product, matrices(adapters))
    assert_products(algebra.scale(adapters, -0.3), wanted)
    assert_products(jax.jit(algebra.scale)(adapters, jnp.float32(-0.3)), wanted)


def test_truncated_product_is_the_nearest_of_the_rank():
    _, adapters = trained(0, rank=4)
    wanted = of_each(lambda product: nearest(product, 2), matrices(adapters))
    assert_products(algebra.truncate(adapters, 2), wanted)
    assert algebra.truncate(adapters, 4) is not adapters
    jax.tree.map(assert_array_equal, algebra.truncate(adapters, 4), adapters)


def test_padded_product_is_the_same_and_truncates_to_it():
    _, adapters = trained(0, rank=2)
    padded = algebra.pad(adapters, 5)
    assert {adapter.rank for adapter in padded.values()} == {5}
    assert_products(padded, matrices(adapters), atol=1e-6)
    assert_products(algebra.truncate(padded, 2), matrices(adapters))


def test_adapters_padded_to_one_rank_stack_and_run_together():
    base, one = trained(0, rank=1, alpha=5.0)
    two = trained(1, rank=2, alpha=0.5)[1]
    padded = [algebra.pad(adapters, 4) for adapters in (one, two)]
    assert jax.tree.structure(padded[0]) == jax.tree.structure(padded[1])
    stacked = jax.tree.map(lambda *factors: jnp.stack(factors), *padded)
    fn = jaxlora.lora(model, strict=True)
    got = jax.vmap(lambda adapters: fn(jaxlora.bind(base, adapters), X))(stacked)
    for y, adapters in zip(got, (one, two), strict=True):
        wanted = model(jaxlora.merge(jaxlora.bind(base, adapters)), X)
        assert_allclose(y, wanted, rtol=1e-4, atol=1e-3 * float(jnp.max(jnp.abs(wanted))))


@settings(max_examples=30, deadline=None, database=None)
@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_truncating_a_sum_loses_its_smallest_singular_values(weights, rank, kept):
    many = [trained(seed, rank=rank)[1] for seed in range(len(weights))]
    joined = algebra.combine(many, weights)
    truncated = matrices(algebra.truncate(joined, kept))
    for path, product in matrices(joined).items():
        lost = np.linalg.norm(product - truncated[path], axis=(-2, -1))
        tail = np.linalg.svd(product, compute_uv=False)[..., kept:]
        atol = 1e-4 * (1 + float(np.linalg.norm(product)))
        assert_allclose(lost, np.linalg.norm(tail, axis=-1), rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: algebra.scale(one, jnp.ones(2)), r"factor must be a scalar.*\(2,\)"),
        (lambda one: algebra.pad(one, 1), "'experts' has 2, got 1"),
        (lambda one: algebra.truncate(one, 0), "at least 1: got 0"),
        (lambda one: algebra.delta(PARAMS, "query"), "'query' is not adapted"),
        (lambda one: algebra.delta(PARAMS, "kye"), "'kye' is no leaf"),
    ],
)
def test_bad_input_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(trained(0)[1])
