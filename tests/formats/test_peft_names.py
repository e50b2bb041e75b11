"""PEFT's names for methods; tests/peers compares with PEFT itself."""

from typing import Any

import jax
import pytest
from dense_products import trained
from numpy.testing import assert_array_equal

from jaxlora import algebra
from jaxlora.formats import peft

pytestmark = pytest.mark.once

KEY = jax.random.key(3)
ADAPTERS = [trained(seed)[1] for seed in range(2)]
combine: Any = peft.combine  # also with what its types refuse


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        (algebra.Concatenation(), "cat", {}),
        (algebra.Linear(), "linear", {}),
        (algebra.Svd(), "svd", {}),
        (algebra.Svd(rank=1), "svd", {"svd_rank": 1}),
        (algebra.MagnitudePruning(0.5), "magnitude_prune", {"density": 0.5}),
        (algebra.Ties(0.5), "ties", {"density": 0.5}),
        (
            algebra.Ties(0.5, "frequency"),
            "ties",
            {"density": 0.5, "majority_sign_method": "frequency"},
        ),
        (algebra.DareLinear(0.5, KEY), "dare_linear", {"density": 0.5, "key": KEY}),
        (algebra.DareTies(0.5, KEY), "dare_ties", {"density": 0.5, "key": KEY}),
        (
            algebra.Svd(algebra.MagnitudePruning(0.5)),
            "magnitude_prune_svd",
            {"density": 0.5},
        ),
        (algebra.Svd(algebra.Ties(0.5), 1), "ties_svd", {"density": 0.5, "svd_rank": 1}),
        (
            algebra.Svd(algebra.DareLinear(0.5, KEY)),
            "dare_linear_svd",
            {"density": 0.5, "key": KEY},
        ),
        (
            algebra.Svd(algebra.DareTies(0.5, KEY, "frequency")),
            "dare_ties_svd",
            {"density": 0.5, "key": KEY, "majority_sign_method": "frequency"},
        ),
    ],
)
def test_name_stands_for_a_method(method, name, options):
    wanted = algebra.combine(ADAPTERS, [0.7, -0.2], method)
    got = combine(ADAPTERS, [0.7, -0.2], name, **options)
    jax.tree.map(assert_array_equal, got, wanted)


def test_default_is_that_of_peft():
    got = peft.combine(ADAPTERS, [0.7, -0.2])
    jax.tree.map(assert_array_equal, got, algebra.combine(ADAPTERS, [0.7, -0.2], algebra.Svd()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {}, "combination_type must be one of .*: got 'mean'"),
        ("ties", {}, "'ties' needs density: got None"),
        ("ties", {"density": 1.5}, r"density must be in \(0, 1\]: got 1.5"),
        ("dare_ties", {"density": 0.5}, "'dare_ties' needs key: got None"),
        ("cat", {"svd_rank": 2}, "'cat' does not use svd_rank: got 2"),
        ("linear", {"density": 0.5}, "'linear' does not use density: got 0.5"),
        ("ties", {"density": 0.5, "key": KEY}, "'ties' does not use key: got an array"),
        (
            "magnitude_prune_svd",
            {"density": 0.5, "majority_sign_method": "frequency"},
            "does not use majority_sign_method: got 'frequency'",
        ),
        ("svd", {"majority_sign_method": "most"}, "majority_sign_method must be one of"),
        ("svd", {"svd_rank": 0}, "rank must be at least 1: got 0"),
    ],
)
def test_what_a_name_does_not_take_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        combine(ADAPTERS, [1.0, 1.0], name, **options)
