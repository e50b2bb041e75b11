"""Amplification and intruders, against their definitions on dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from dense_products import matrices, trained
from numpy.testing import assert_allclose, assert_array_equal
from test_spectra import adapter, by_entry

import jaxlora
from jaxlora import analysis

pytestmark = pytest.mark.once


def dense(weight, adapter):
    """Return a weight as matrices with the axes of the adapter's stack."""
    roles = adapter.roles
    order = (*roles.stack, *roles.in_, *roles.out)
    stack, in_, _ = roles.sizes(weight.shape)
    return np.asarray(weight, np.float64).transpose(order).reshape(*stack, int(np.prod(in_)), -1)


def within(weight, other, rank):
    u, _, v = np.linalg.svd(other)
    return np.linalg.norm(u[:, :rank].T @ weight @ v[:rank].T)


def test_amplification_is_its_definition():
    base, adapters = trained(0, rank=2)
    found = analysis.amplification(base, adapters)
    for path, products in matrices(adapters).items():
        weights = dense(base[path], adapters[path])
        weights = weights.reshape(-1, *weights.shape[-2:])
        rows = [
            (np.linalg.norm(d), np.linalg.norm(w), within(w, d, 2), within(w, w, 2))
            for d, w in zip(products, weights, strict=True)
        ]
        product, weight, inside, own = (
            by_entry(np.array(x), adapters[path]) for x in zip(*rows, strict=True)
        )
        norms = found.norms[path]
        assert_allclose(found[path], product / inside, rtol=1e-4)
        assert_allclose(norms.product, product, rtol=1e-5)
        assert_allclose(norms.weight, weight, rtol=1e-5)
        assert_allclose(norms.within_product, inside, rtol=1e-4)
        assert_allclose(norms.within_weight, own, rtol=1e-5)
    assert "in its directions" in str(found)


def test_norm_within_random_directions_is_that_of_drawn_ones():
    weight, rank = normal(0, 24, 16), 3
    draw = np.random.default_rng(0)
    squares = []
    for _ in range(400):
        u, v = (np.linalg.qr(draw.normal(size=(n, rank)))[0] for n in weight.shape)
        squares.append(np.linalg.norm(u.T @ np.asarray(weight) @ v) ** 2)
    adapters = {"w": adapter(normal(1, 24, rank), normal(2, rank, 16))}
    found = analysis.amplification({"w": weight}, adapters).norms["w"]
    assert_allclose(found.within_random**2, np.mean(squares), rtol=0.1)


def test_the_numbers_of_the_paper_for_random_directions():
    """Table 7 of arXiv:2106.09685: 0.02 and 0.33 of a norm of 61.95, at ranks 4 and 64."""
    d, norm = 12288, 61.95
    for rank, told in ((4, 0.02), (64, 0.33)):
        assert rank * norm / d == pytest.approx(told, abs=0.01)


def test_a_product_of_zero_and_a_weight_of_zero():
    a, b, weight = normal(0, 8, 2), normal(1, 2, 6), normal(2, 8, 6)
    nothing = analysis.amplification({"w": weight}, {"w": adapter(a, 0 * b)})
    assert nothing["w"] == 0
    blind = analysis.amplification({"w": 0 * weight}, {"w": adapter(a, b)})
    assert np.isinf(blind["w"])


def intruding():
    """Return a base with known vectors, and an adapter that adds a strong one and weak others."""
    draw = np.random.default_rng(0)
    u, v = (np.linalg.qr(draw.normal(size=(n, 16)))[0] for n in (24, 20))
    base = (u * np.linspace(4, 1, 16)) @ v.T
    spread = v @ np.full(16, 0.25)  # as like one vector of the base as another, and a unit vector
    a = np.stack([6 * (u @ np.full(16, 0.25)), u[:, 3]], 1)
    return {"w": jnp.array(base)}, {"w": adapter(jnp.array(a), jnp.array([spread, 0.1 * v[:, 3]]))}


def test_intruders_are_the_vectors_that_the_base_lacks():
    base, adapters = intruding()
    found = analysis.intruders(base, adapters, k=4)["w"]
    tuned = np.asarray(base["w"] + adapters["w"].delta(base["w"]), np.float64)
    _, s, v = np.linalg.svd(tuned)
    _, _, before = np.linalg.svd(np.asarray(base["w"], np.float64), full_matrices=False)
    likeness = np.abs(v[:4] @ before.T).max(1)
    assert_allclose(found.values, s[:4], rtol=1e-5)
    assert_allclose(found.likeness, likeness, atol=1e-4)
    assert_array_equal(found.found, likeness < 0.5)
    assert found.count == 1


def test_without_intruders_is_the_adapted_weight_without_them():
    base, adapters = intruding()
    left = analysis.without_intruders(base, adapters, k=4)
    tuned = np.asarray(base["w"] + adapters["w"].delta(base["w"]), np.float64)
    u, s, v = np.linalg.svd(tuned, full_matrices=False)
    wanted = tuned - s[0] * np.outer(u[:, 0], v[0])
    assert left["w"].rank == 3
    assert_allclose(base["w"] + left["w"].delta(base["w"]), wanted, atol=1e-4)
    assert analysis.intruders(base, left, k=4)["w"].count == 0
    assert analysis.without_intruders(base, left, k=4)["w"] is left["w"]


def test_entries_of_a_stack_lose_what_is_theirs():
    base, adapters = intruding()
    one = adapters["w"]
    stack = {"w": jnp.stack([base["w"], base["w"]])}
    pair = {"w": adapter(jnp.stack([one.a, one.a]), jnp.stack([one.b, one.b.at[0].set(0)]))}
    found = analysis.intruders(stack, pair, k=4)
    assert_array_equal(found["w"].count, [1, 0])
    left = analysis.without_intruders(stack, pair, k=4)["w"]
    deltas = left.delta(stack["w"])
    alone = analysis.without_intruders(base, adapters, k=4)["w"].delta(base["w"])
    assert_allclose(deltas[0], alone, atol=1e-4)
    assert_allclose(deltas[1], pair["w"].delta(stack["w"])[1], atol=1e-5)


def test_a_magnitude_counts_for_what_intrudes_and_cannot_be_taken_off():
    params, x = {"w": normal(0, 8, 6)}, normal(1, 5, 8)
    config = jaxlora.LoRAConfig(rank=2, magnitude=True)
    adapted = jaxlora.init(
        jax.random.key(0), lambda params, x: x @ params["w"], params, x, config=config
    )
    base, adapters = jaxlora.split(jax.tree.map(lambda leaf: leaf + 0.2, adapted))
    found = analysis.intruders(base, adapters, k=3)["w"]
    tuned = jaxlora.merge(jaxlora.bind(base, adapters))["w"]
    assert_allclose(found.values, np.linalg.svd(tuned, compute_uv=False)[:3], rtol=1e-5)
    with pytest.raises(ValueError, match="the adapter of 'w' has a magnitude"):
        analysis.without_intruders(base, adapters)


def test_numbers_of_intruders_are_checked():
    base, adapters = intruding()
    with pytest.raises(ValueError, match="k must be at least 1: got 0"):
        analysis.intruders(base, adapters, k=0)
    with pytest.raises(ValueError, match=r"epsilon must be in \(0, 1\]: got 2"):
        analysis.without_intruders(base, adapters, epsilon=2)
    with pytest.raises(TypeError, match=r"inside of jax\.jit"):
        jax.jit(analysis.without_intruders)(base, adapters)
