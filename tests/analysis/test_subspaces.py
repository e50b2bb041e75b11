"""Similarity of subspaces, against its definition and on subspaces with known angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from dense_products import matrices, trained
from numpy.testing import assert_allclose
from test_spectra import adapter, by_entry

import jaxlora
from jaxlora import analysis

pytestmark = pytest.mark.once


def phi(u, v):
    """Return ``||U_i^T V_j||² / min(i, j)`` for all i and j, by its definition."""
    return np.array(
        [
            [
                np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)
                for j in range(1, v.shape[1] + 1)
            ]
            for i in range(1, u.shape[1] + 1)
        ]
    )


def vectors(matrix, rank, side):
    u, _, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u[:, :rank] if side == "in" else v.T[:, :rank]


@pytest.mark.parametrize("side", ["in", "out"])
def test_similarity_is_its_definition(side):
    base, first = trained(0, rank=3)
    _, second = trained(1, rank=2)
    found = analysis.similarity(first, second, side)
    one, other = matrices(first), matrices(second)
    for path, got in found.items():
        wanted = np.stack(
            [
                phi(vectors(a, 3, side), vectors(b, 2, side))
                for a, b in zip(one[path], other[path], strict=True)
            ]
        )
        assert_allclose(got, by_entry(wanted, first[path]), rtol=1e-4, atol=1e-5)
    of_base = analysis.similarity(jaxlora.bind(base, first), base, side)
    wanted = phi(vectors(one["out"][0], 3, side), vectors(base["out"].reshape(8, 8), 3, side))
    assert_allclose(of_base["out"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
def test_of_factors_compares_them_alone(side):
    one, other = (adapter(normal(i, 40, 3), normal(i + 5, 3, 30)) for i in range(2))
    got = analysis.similarity({"w": one}, {"w": other}, side, of="factor")["w"]
    first, second = (x.a if side == "in" else x.b.T for x in (one, other))
    assert_allclose(got, phi(vectors(first, 3, "in"), vectors(second, 3, "in")), atol=1e-5)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, np.pi / 2])
def test_subspaces_at_known_angles(angle):
    """Each direction of one lies at this angle to one of the other: φ(i, i) is cos² of it."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 8)))
    turned = np.cos(angle) * basis[:, :4] + np.sin(angle) * basis[:, 4:]
    strength = np.array([8.0, 4.0, 2.0, 1.0])[:, None]
    b = strength * np.linalg.qr(np.random.default_rng(1).normal(size=(20, 4)))[0].T
    one, other = (adapter(jnp.array(a), jnp.array(b)) for a in (basis[:, :4], turned))
    found = analysis.similarity({"w": one}, {"w": other})
    assert_allclose(np.diag(found["w"]), np.cos(angle) ** 2, atol=1e-5)
    assert_allclose(found.random["w"][-1, -1], 4 / 32)
    wanted = (np.cos(angle) ** 2 - 4 / 32) / (1 - 4 / 32)
    assert_allclose(found.normalized["w"][-1, -1], wanted, atol=1e-5)


def test_random_is_the_mean_of_random_subspaces():
    keys = jax.random.split(jax.random.key(0), 400)
    a = jax.vmap(lambda key: jax.random.normal(key, (16, 5)))(keys)
    b = jax.vmap(lambda key: jax.random.normal(key, (5, 16)))(keys)
    first, second = adapter(a[:200], b[:200]), adapter(a[200:, :, :3], b[200:, :3])
    found = analysis.similarity({"w": first}, {"w": second})
    assert_allclose(found["w"].mean(0), found.random["w"], atol=0.03)
    assert found.random["w"].shape == (5, 3)


def test_what_one_has_alone_is_told():
    one = adapter(normal(0, 8, 2), normal(1, 2, 6))
    found = analysis.similarity({"u": one, "v": one}, {"v": one, "w": one})
    assert [*found] == ["v"]
    assert found.left_out == ("u", "w")


def test_what_cannot_be_compared_is_refused():
    one, wide = (adapter(normal(0, n, 2), normal(1, 2, 6)) for n in (8, 9))
    with pytest.raises(ValueError, match="must have a path in common: got u and w"):
        analysis.similarity({"u": one}, {"w": one})
    with pytest.raises(ValueError, match="must be for one weight at 'w'"):
        analysis.similarity({"w": one}, {"w": wide})
    with pytest.raises(ValueError, match="side must be one of"):
        analysis.similarity({"w": one}, {"w": one}, "left")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="of must be one of"):
        analysis.similarity({"w": one}, {"w": one}, of="a")  # pyright: ignore[reportArgumentType]
