"""Several sets of adapters as one, against NumPy on the factors and the dense products."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from attention import PARAMS, X
from cases import normal
from dense_products import assert_products, matrices, nearest, of_each, trained
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora.algebra import (
    Concatenation,
    DareLinear,
    DareTies,
    Linear,
    MagnitudePruning,
    Svd,
    Ties,
    add,
    combine,
)
from jaxlora.weights import Roles

pytestmark = pytest.mark.once

OTHER = {name: weight + 1 for name, weight in PARAMS.items()}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.2)])
def test_joined_product_is_the_weighted_sum(weights):
    one, two = trained(0, rank=2)[1], trained(1, rank=3, alpha=7)[1]
    wanted = of_each(lambda p, q: weights[0] * p + weights[1] * q, matrices(one), matrices(two))
    joined = combine([one, two], weights)
    assert_products(joined, wanted)
    assert {adapter.rank for adapter in joined.values()} == {5}
    if weights == (1.0, 1.0):
        assert_products(add(one, two), wanted)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("method", [Concatenation(), Svd(), Linear()])
def test_factors_of_two_dtypes_are_rounded_to_neither(method, order):
    narrow, wide = trained(0)[1], trained(1)[1]
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), narrow)
    found = combine([narrow, wide][::order], [0.5, 2.0][::order], method)
    same = jax.tree.map(lambda x: x.astype("float32"), narrow)
    wanted = combine([same, wide][::order], [0.5, 2.0][::order], method)
    jax.tree.map(assert_array_equal, found, wanted)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float32")}


@jax.enable_x64(True)
def test_factors_of_64_bits_are_combined_in_64():
    rng = np.random.default_rng(0)

    def drawn():
        a, b = (jax.numpy.asarray(rng.normal(size=shape)) for shape in ((5, 2), (2, 4)))
        return {"w": jaxlora.Adapter(a, b, Roles((), (0,), (1,)), alpha=2.0, shape=(5, 4))}

    first, second = drawn(), drawn()
    wanted = first["w"].a @ first["w"].b + second["w"].a @ second["w"].b
    for method in (Concatenation(), Svd(rank=4)):
        found = combine([first, second], [1.0, 1.0], method)["w"]
        assert_allclose(found.a @ found.b, wanted, rtol=1e-13)


@pytest.mark.parametrize(("given", "rank"), [(None, 3), (1, 1), (4, 4)])
def test_svd_is_the_nearest_to_the_weighted_sum(given, rank):
    one, two = trained(0, rank=2)[1], trained(1, rank=3)[1]
    wanted = of_each(lambda p, q: nearest(0.7 * p - 0.2 * q, rank), matrices(one), matrices(two))
    combined = combine([one, two], [0.7, -0.2], Svd(rank=given))
    assert_products(combined, wanted)
    assert {adapter.rank for adapter in combined.values()} == {rank}


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


@pytest.mark.parametrize("method", [Concatenation(), Svd(rank=6), Svd(Ties(1.0), rank=6)], ids=str)
@pytest.mark.parametrize("name", OVERLAPS)
def test_adapters_of_parts_that_overlap_become_those_of_a_block(name, method):
    *targets, wanted = OVERLAPS[name]
    one, two = (trained(seed, targets=tuple(names))[1] for seed, names in enumerate(targets))
    combined = combine([one, two], [0.7, -0.2], method)
    assert list(combined) == wanted
    added = jaxlora.merge(jaxlora.bind(PARAMS, combined))["experts"] - PARAMS["experts"]
    products = [dense_of(one), dense_of(two)]
    total = linear(products, (0.7, -0.2))
    if method == Svd(Ties(1.0), rank=6):
        total = ties(products, (0.7, -0.2), 1.0)
    assert_allclose(added, total, rtol=1e-4, atol=1e-3)


def test_path_that_ends_in_brackets_is_no_part():
    config = jaxlora.LoRAConfig(rank=1)
    fn = lambda params, x: x @ params["w[0:2]"]  # noqa: E731
    base = {"w[0:2]": normal(0, 8, 4)}
    params = jaxlora.init(jax.random.key(0), fn, base, X[0], config=config)
    adapters = jaxlora.split(params)[1]
    assert list(add(adapters, adapters)) == ["w[0:2]"]


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


RULES = [
    (Linear(), linear),
    (MagnitudePruning(0.6), functools.partial(magnitude_prune, density=0.6)),
    (Ties(0.6), functools.partial(ties, density=0.6)),
    (Ties(0.6, "frequency"), functools.partial(ties, density=0.6, majority="frequency")),
]
WEIGHTS = (0.9, -0.4, 0.3)


@pytest.mark.parametrize(("method", "rule"), RULES)
def test_factors_are_combined_entry_by_entry(method, rule):
    many = [trained(seed, alpha=seed + 1.0)[1] for seed in range(3)]
    combined = combine(many, WEIGHTS, method)
    scaled = [w * (seed + 1) / 2 for seed, w in enumerate(WEIGHTS)]
    roots = np.sqrt(np.abs(scaled))
    for path, adapter in combined.items():
        assert adapter.alpha == adapter.rank
        is_stack = bool(adapter.roles.stack)
        for factor, weights in (("a", np.sign(scaled) * roots), ("b", roots)):
            arrays = [np.asarray(getattr(one[path], factor)) for one in many]
            entries = list(zip(*arrays, strict=True)) if is_stack else [arrays]
            wanted = [rule(list(entry), weights) for entry in entries]
            wanted = np.stack(wanted) if is_stack else wanted[0]
            assert_allclose(getattr(adapter, factor), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "rule"), RULES)
def test_products_are_combined_and_the_nearest_of_a_rank_is_taken(method, rule):
    many = [trained(seed, alpha=seed + 1.0)[1] for seed in range(3)]
    combined = combine(many, WEIGHTS, Svd(method, rank=3))

    def wanted(*products):
        entries = zip(*products, strict=True)
        return nearest(np.stack([rule(list(e), WEIGHTS) for e in entries]), 3)

    assert_products(combined, of_each(wanted, *map(matrices, many)), atol=1e-3)


def test_what_is_drawn_is_the_sum_in_the_mean_and_all_of_it_at_density_one(key):
    many = [trained(seed)[1] for seed in range(2)]
    draw = functools.partial(combine, many, [0.6, 0.5])
    exact = draw(Linear())
    jax.tree.map(
        functools.partial(assert_allclose, rtol=1e-5, atol=1e-5),
        draw(DareLinear(1.0, key)),
        exact,
    )
    drawn = [draw(DareLinear(0.5, k)) for k in jax.random.split(key, 200)]
    for path in exact:
        values = np.stack([one[path].a for one in drawn])
        error = values.std(0) / np.sqrt(len(drawn))
        assert (np.abs(values.mean(0) - exact[path].a) < 5 * error + 1e-6).all()
        assert 0.2 < (values == 0).mean() < 0.3  # both of the two are dropped


@pytest.mark.parametrize(
    "method",
    [
        lambda key: DareTies(0.5, key),
        lambda key: Svd(DareTies(0.5, key)),
        lambda key: Svd(DareLinear(0.5, key)),
    ],
)
def test_draws_are_those_of_the_key(method, key):
    many = [trained(seed)[1] for seed in range(2)]
    keys = (key, key, jax.random.key(9))
    one, same, other = (combine(many, [0.6, 0.5], method(k)) for k in keys)
    jax.tree.map(assert_array_equal, one, same)
    assert not np.array_equal(one["query"].a, other["query"].a)
    fewer = [{"query": adapters["query"]} for adapters in many]
    alone = combine(fewer, [0.6, 0.5], method(key))  # no other path changes what is drawn
    assert_array_equal(alone["query"].a, one["query"].a)


def test_weights_that_some_lack_are_combined_from_the_others():
    one, two = trained(0)[1], trained(1, targets=("query",))[1]
    wanted = matrices(one) | {"query": matrices(one)["query"] + 2 * matrices(two)["query"]}
    assert_products(combine([one, two], [1.0, 2.0]), wanted)


ONE = trained(0)[1]
THREE = trained(1, rank=3)[1]
any_of: Any = combine  # also with what its types refuse
ties_of: Any = Ties
dare_of: Any = DareTies


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (TypeError, lambda: any_of([ONE], [1.0], "ties"), r"as Ties\(density=0.5\): got 'ties'"),
        (TypeError, lambda: any_of([ONE], [1.0], Ties), "got the class 'Ties'"),
        (TypeError, lambda: any_of([ONE], [1.0], None), "method must be .*: got None"),
        (ValueError, lambda: combine([], []), "got 0 sets and 0 weights"),
        (ValueError, lambda: combine([ONE], [1.0, 2.0]), "got 1 sets and 2 weights"),
        (ValueError, lambda: combine([ONE], [np.nan]), r"weights\[0\] must be finite: got nan"),
        (ValueError, lambda: Ties(1.5), r"in \(0, 1\]: got 1.5"),
        (ValueError, lambda: MagnitudePruning(0.0), r"in \(0, 1\]: got 0.0"),
        (TypeError, lambda: ties_of(None), "density must be a number: got None"),
        (ValueError, lambda: ties_of(0.5, "most"), "majority must be one of"),
        (TypeError, lambda: dare_of(0.5, 3), r"got 3; .* the order is DareTies\(density, key\)"),
        (ValueError, lambda: Svd(rank=0), "at least 1: got 0"),
        (TypeError, lambda: Svd(Svd()), "rule must sum arrays, .*: got Svd"),  # pyright: ignore
        (
            ValueError,
            lambda: combine([ONE, THREE], [1.0, 1.0], Linear()),
            r"method Linear needs equal ranks: 'experts' has \[2, 3\]",
        ),
        (
            ValueError,
            lambda: add(ONE, {"query": ONE["out"]}),
            "the adapters of 'query' are for different weights",
        ),
        (
            ValueError,
            lambda: add(ONE, {"query": trained(0, base=OTHER)[1]["query"]}),
            "the adapters of 'query' are for different weights: with hash ",
        ),
    ],
)
def test_bad_input_is_told(error, call, message):
    with pytest.raises(error, match=message):
        call()
