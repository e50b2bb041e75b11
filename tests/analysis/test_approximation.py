"""What matrices of a low rank explain, against NumPy's best ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention import PARAMS, X, model
from cases import normal
from dense_products import matrices, nearest, trained
from numpy.testing import assert_allclose

import jaxlora
from jaxlora import analysis

pytestmark = pytest.mark.once


def test_error_and_energy_are_those_of_the_nearest_matrices():
    weight = normal(0, 3, 12, 9)
    ranks = (1, 4, 9, 20)
    found = analysis.explained(weight, ranks)
    for i, rank in enumerate(ranks):
        left = np.linalg.norm(weight - nearest(np.asarray(weight), rank), axis=(1, 2))
        whole = np.linalg.norm(weight, axis=(1, 2))
        assert_allclose(found.error[:, i], left / whole, atol=1e-5)
        assert_allclose(found.energy[:, i], 1 - (left / whole) ** 2, atol=1e-5)
    assert found.error.shape == (3, 4)


def test_the_change_of_adapters_is_explained_at_their_rank():
    base, adapters = trained(0, rank=2)
    tuned = jaxlora.merge(jaxlora.bind(base, adapters))
    sites = jaxlora.find_sites(model, PARAMS, X)
    found = analysis.explained(tuned, (1, 2), base=base, sites=sites)
    assert [*found] == [*adapters]
    for path, products in matrices(adapters).items():
        assert_allclose(found[path].error[..., 1], 0, atol=1e-5)
        s = np.linalg.svd(products, compute_uv=False)
        wanted = s[..., 0] ** 2 / (s**2).sum(-1)
        assert_allclose(found[path].energy[..., 0].reshape(-1), wanted, rtol=1e-4)
        assert np.all(found[path].rank_for(0.999) <= 2)
    assert "1: " in str(found)


def test_trees_without_sites_have_their_matrices_looked_at():
    found = analysis.explained({"w": normal(0, 8, 6), "bias": normal(1, 6)}, [2])
    assert [*found] == ["w"]
    assert found.left_out == ("bias",)


@pytest.mark.parametrize(
    ("weight", "options", "kind", "message"),
    [
        (normal(0, 4, 4), {"ranks": ()}, ValueError, "at least one: got none"),
        (normal(0, 4, 4), {"ranks": (0,)}, ValueError, r"ranks\[0\] must be at least 1: got 0"),
        (normal(0, 4, 4), {"ranks": 3}, TypeError, "ranks must be ints in order"),
        (normal(0, 4), {}, ValueError, "must be a matrix"),
        (jnp.ones((4, 4), "int32"), {}, TypeError, "weight must be floating"),
        (normal(0, 4, 4), {"base": normal(0, 4, 3)}, ValueError, r"got \(4, 3\) beside \(4, 4\)"),
        (normal(0, 4, 4), {"base": "w"}, TypeError, "base must be an array, as weight"),
        ({"b": normal(0, 4)}, {}, ValueError, "must be a weight to look at: got b; sites tell"),
        (PARAMS, {"base": PARAMS}, ValueError, "must be a weight to look at: got no change"),
        (PARAMS, {"sites": "all"}, TypeError, "sites must be from jaxlora.find_sites"),
    ],
)
def test_what_cannot_be_explained_is_refused(weight, options, kind, message):
    with pytest.raises(kind, match=message):
        analysis.explained(weight, **{"ranks": (1,)} | options)
