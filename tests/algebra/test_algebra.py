"""Algebra on adapters, against NumPy on the dense products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention import PARAMS, X, model
from cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora import algebra

pytestmark = pytest.mark.once

combine: Any = algebra.combine  # also with what its types refuse

OTHER = {name: weight + 1 for name, weight in PARAMS.items()}


def trained(seed, rank=2, alpha=3.0, targets: Any = "all-linear", base=PARAMS):
    """Return adapters with no factor zero, and their base."""
    config = jaxlora.LoRAConfig(rank=rank, alpha=alpha, targets=targets)
    params = jaxlora.init(jax.random.key(seed), model, base, X, config=config)
    base, adapters = jaxlora.split(params)
    keys = iter(jax.random.split(jax.random.key(seed + 100), 2 * len(adapters)))
    return base, jax.tree.map(lambda f: jax.random.normal(next(keys), f.shape), adapters)


def matrices(adapters):
    """Return each product as a stack of matrices, computed by NumPy."""
    found = {}
    for path, adapter in adapters.items():
        count = len(adapter.roles.stack)
        a, b = (np.asarray(factor, np.float64) for factor in (adapter.a, adapter.b))
        a = a.reshape(int(np.prod(a.shape[:count])), -1, adapter.rank)
        b = b.reshape(len(a), adapter.rank, -1)
        found[path] = adapter.alpha / adapter.rank * a @ b
    return found


def nearest(matrix, rank):
    """Return the nearest stack of matrices of a rank."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def assert_products(adapters, wanted, atol=1e-4):
    got = matrices(adapters)
    assert list(got) == list(wanted)
    for path in wanted:
        assert_allclose(got[path], wanted[path], rtol=1e-4, atol=atol, err_msg=path)


def of_each(function, *products):
    return {path: function(*(product[path] for product in products)) for path in products[0]}


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


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.2)])
def test_joined_product_is_the_weighted_sum(weights):
    one, two = trained(0, rank=2)[1], trained(1, rank=3, alpha=7)[1]
    wanted = of_each(lambda p, q: weights[0] * p + weights[1] * q, matrices(one), matrices(two))
    joined = algebra.combine([one, two], weights)
    assert_products(joined, wanted)
    assert {adapter.rank for adapter in joined.values()} == {5}
    if weights == (1.0, 1.0):
        assert_products(algebra.add(one, two), wanted)


@pytest.mark.parametrize(("given", "rank"), [(None, 3), (1, 1), (4, 4)])
def test_svd_is_the_nearest_to_the_weighted_sum(given, rank):
    one, two = trained(0, rank=2)[1], trained(1, rank=3)[1]
    wanted = of_each(lambda p, q: nearest(0.7 * p - 0.2 * q, rank), matrices(one), matrices(two))
    combined = algebra.combine([one, two], [0.7, -0.2], "svd", rank=given)
    assert_products(combined, wanted)
    assert {adapter.rank for adapter in combined.values()} == {rank}


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


def dense_of(adapters, path="experts"):
    """Return the sum of the products for one weight in its shape, computed by NumPy."""
    total = np.zeros(PARAMS[path].shape)
    for name, adapter in adapters.items():
        index = np.s_[:, :, :]
        if "[" in name:
            index = eval(f"np.s_[{name.split('[')[1][:-1]}]", {"np": np})
        a, b = (np.asarray(factor, np.float64) for factor in (adapter.a, adapter.b))
        total[index] += adapter.alpha / adapter.rank * np.einsum("sir,sro->sio", a, b)
    return total


OVERLAPS = {
    "a part and all": (["experts[1:2]"], ["experts"], ["experts"]),
    "all and parts": (["experts"], ["experts[:, :, 0:3]", "experts[:, :, 3:6]"], ["experts"]),
    "parts of inputs": (
        ["experts[:, 0:5]"],
        ["experts[:, 3:6, 1:4]"],
        ["experts[:, 0:6, :]"],
    ),
    "a chain": (
        ["experts[:, :, 0:2]", "experts[:, :, 3:5]"],
        ["experts[:, :, 1:4]"],
        ["experts[:, :, 0:5]"],
    ),
    "apart": (
        ["experts[0:1]"],
        ["experts[1:3]"],
        ["experts[0:1, :, :]", "experts[1:3, :, :]"],
    ),
    "equal": (["experts[0:2]"], ["experts[0:2]"], ["experts[0:2, :, :]"]),
}


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd"])
@pytest.mark.parametrize("name", OVERLAPS)
def test_adapters_of_parts_that_overlap_become_those_of_a_block(name, method):
    *targets, wanted = OVERLAPS[name]
    one, two = (trained(seed, targets=tuple(names))[1] for seed, names in enumerate(targets))
    options = {} if method == "cat" else {"rank": 6}
    options |= {"density": 1.0} if method == "ties_svd" else {}
    combined = combine([one, two], [0.7, -0.2], method, **options)
    assert list(combined) == wanted
    added = jaxlora.merge(jaxlora.bind(PARAMS, combined))["experts"] - PARAMS["experts"]
    products = [dense_of(one), dense_of(two)]
    total = linear(products, (0.7, -0.2))
    if method == "ties_svd":
        total = ties(products, (0.7, -0.2), 1.0)
    assert_allclose(added, total, rtol=1e-4, atol=1e-3)


def test_path_that_ends_in_brackets_is_no_part():
    config = jaxlora.LoRAConfig(rank=1)
    fn = lambda params, x: x @ params["w[0:2]"]  # noqa: E731
    base = {"w[0:2]": normal(0, 8, 4)}
    params = jaxlora.init(jax.random.key(0), fn, base, X[0], config=config)
    adapters = jaxlora.split(params)[1]
    assert list(algebra.add(adapters, adapters)) == ["w[0:2]"]


def pruned(x, density):
    kept = np.argsort(-np.abs(x), axis=None, kind="stable")[: int(density * x.size)]
    return np.where(np.isin(np.arange(x.size), kept).reshape(x.shape), x, 0)


def linear(arrays, weights):
    return sum(weight * x for x, weight in zip(arrays, weights, strict=True))


def magnitude_prune(arrays, weights, density):
    return linear([pruned(x, density) for x in arrays], weights)


def ties(arrays, weights, density, majority="total"):
    kept = np.stack([pruned(x, density) for x in arrays])
    votes = (kept if majority == "total" else np.sign(kept)).sum(0)
    agrees = np.sign(kept) == np.where(votes >= 0, 1, -1)
    weighted = kept * agrees * np.reshape(weights, (-1, *[1] * arrays[0].ndim))
    return weighted.sum(0) / np.maximum(agrees.sum(0), 1)


RULES = {
    "linear": (linear, {}),
    "magnitude_prune": (magnitude_prune, {"density": 0.6}),
    "ties": (ties, {"density": 0.6}),
    "ties by frequency": (ties, {"density": 0.6, "majority": "frequency"}),
}
WEIGHTS = (0.9, -0.4, 0.3)


@pytest.mark.parametrize("name", RULES)
def test_factors_are_combined_entry_by_entry(name):
    rule, options = RULES[name]
    many = [trained(seed, alpha=seed + 1.0)[1] for seed in range(3)]
    combined = combine(many, WEIGHTS, name.split()[0], **options)
    scaled = [w * (seed + 1) / 2 for seed, w in enumerate(WEIGHTS)]
    roots = np.sqrt(np.abs(scaled))
    for path, adapter in combined.items():
        assert adapter.alpha == adapter.rank
        is_stack = bool(adapter.roles.stack)
        for factor, weights in (("a", np.sign(scaled) * roots), ("b", roots)):
            arrays = [np.asarray(getattr(one[path], factor)) for one in many]
            entries = list(zip(*arrays, strict=True)) if is_stack else [arrays]
            wanted = [rule(list(entry), weights, **options) for entry in entries]
            wanted = np.stack(wanted) if is_stack else wanted[0]
            assert_allclose(getattr(adapter, factor), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RULES if name != "linear"])
def test_products_are_combined_and_the_nearest_of_a_rank_is_taken(name):
    rule, options = RULES[name]
    many = [trained(seed, alpha=seed + 1.0)[1] for seed in range(3)]
    method = f"{name.split()[0]}_svd"
    combined = combine(many, WEIGHTS, method, rank=3, **options)

    def wanted(*products):
        entries = zip(*products, strict=True)
        return nearest(np.stack([rule(list(e), WEIGHTS, **options) for e in entries]), 3)

    assert_products(combined, of_each(wanted, *map(matrices, many)), atol=1e-3)


def test_what_is_drawn_is_the_sum_in_the_mean_and_all_of_it_at_density_one(key):
    many = [trained(seed)[1] for seed in range(2)]
    draw = functools.partial(combine, many, [0.6, 0.5])
    exact = draw("linear")
    jax.tree.map(
        functools.partial(assert_allclose, rtol=1e-5, atol=1e-5),
        draw("dare_linear", density=1.0, key=key),
        exact,
    )
    drawn = [draw("dare_linear", density=0.5, key=k) for k in jax.random.split(key, 200)]
    for path in exact:
        values = np.stack([one[path].a for one in drawn])
        error = values.std(0) / np.sqrt(len(drawn))
        assert (np.abs(values.mean(0) - exact[path].a) < 5 * error + 1e-6).all()
        assert 0.2 < (values == 0).mean() < 0.3  # both of the two are dropped


@pytest.mark.parametrize("method", ["dare_ties", "dare_ties_svd", "dare_linear_svd"])
def test_draws_are_those_of_the_key(method, key):
    many = [trained(seed)[1] for seed in range(2)]
    draw = functools.partial(combine, many, [0.6, 0.5], method, density=0.5)
    one, same, other = draw(key=key), draw(key=key), draw(key=jax.random.key(9))
    jax.tree.map(assert_array_equal, one, same)
    assert not np.array_equal(one["query"].a, other["query"].a)


def test_weights_that_some_lack_are_combined_from_the_others():
    one, two = trained(0)[1], trained(1, targets=("query",))[1]
    wanted = matrices(one) | {"query": matrices(one)["query"] + 2 * matrices(two)["query"]}
    assert_products(algebra.combine([one, two], [1.0, 2.0]), wanted)


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


ONE = trained(0)[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: combine([ONE], [1.0], "mean"), "method must be one of .*: got 'mean'"),
        (lambda: combine([], []), "got 0 sets and 0 weights"),
        (lambda: combine([ONE], [1.0, 2.0]), "got 1 sets and 2 weights"),
        (lambda: combine([ONE], [float("nan")]), r"weights\[0\] must be finite: got nan"),
        (lambda: combine([ONE], [1.0], "ties"), "'ties' needs density"),
        (lambda: combine([ONE], [1.0], "ties", density=1.5), r"in \(0, 1\]: got 1.5"),
        (lambda: combine([ONE], [1.0], "dare_ties", density=0.5), "needs key"),
        (lambda: combine([ONE], [1.0], "cat", rank=2), "'cat' does not use rank: got 2"),
        (lambda: combine([ONE], [1.0], "svd", rank=0), "at least 1: got 0"),
        (
            lambda: combine([ONE], [1.0], "ties", density=0.5, majority="most"),
            "majority must be one of",
        ),
        (
            lambda: combine([ONE, trained(1, rank=3)[1]], [1.0, 1.0], "linear"),
            r"needs equal ranks: 'experts' has \[2, 3\]",
        ),
        (
            lambda: algebra.add(ONE, {"query": ONE["out"]}),
            "the adapters of 'query' are for different weights",
        ),
        (
            lambda: algebra.add(ONE, {"query": trained(0, base=OTHER)[1]["query"]}),
            "the adapters of 'query' are for different weights: with hash ",
        ),
        (lambda: algebra.scale(ONE, jnp.ones(2)), r"factor must be a scalar.*\(2,\)"),
        (lambda: algebra.pad(ONE, 1), "'experts' has 2, got 1"),
        (lambda: algebra.truncate(ONE, 0), "at least 1: got 0"),
        (lambda: algebra.delta(PARAMS, "query"), "'query' is not adapted"),
        (lambda: algebra.delta(PARAMS, "kye"), "'kye' is no leaf"),
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
