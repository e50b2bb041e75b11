"""Singular values of adapters, against NumPy's of the dense products."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from dense_products import matrices, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora import analysis
from jaxlora.analysis import spectra

pytestmark = pytest.mark.once


def adapter(a, b, alpha=None):
    *stack, in_, rank = a.shape
    axes = range(len(stack) + 2)
    roles = jaxlora.weights.Roles(tuple(axes[:-2]), (axes[-2],), (axes[-1],))
    shape = (*stack, in_, b.shape[-1])
    return jaxlora.Adapter(a, b, roles, alpha=alpha or float(rank), shape=shape)


def by_entry(matrix, adapter):
    """Return a stack of matrices from NumPy with the axes of the adapter's stack."""
    stack = adapter.a.shape[: len(adapter.roles.stack)]
    return np.reshape(matrix, (*stack, *matrix.shape[1:]))


def test_values_are_those_of_the_dense_products():
    base, adapters = trained(0, rank=3)
    for found in (
        analysis.spectrum(adapters),
        analysis.spectrum(jaxlora.bind(base, adapters)),
        jax.jit(analysis.spectrum)(adapters, base),
    ):
        assert [*found] == [*adapters]
        for path, products in matrices(adapters).items():
            dense = by_entry(products, adapters[path])
            values = np.linalg.svd(dense, compute_uv=False)[..., :3]
            assert_allclose(found[path].values, values, rtol=1e-5)
            assert_allclose(found[path].norm, np.linalg.norm(dense, axis=(-2, -1)), rtol=1e-5)


def test_share_is_of_the_weight():
    base, adapters = trained(0)
    assert analysis.spectrum(adapters)["out"].share is None
    found = analysis.spectrum(adapters, base)
    for path in ("out", "query"):
        delta = adapters[path].delta(base[path])
        wanted = np.linalg.norm(delta) / np.linalg.norm(base[path])
        assert_allclose(np.asarray(found[path].share), wanted, rtol=1e-5)
    assert np.shape(np.asarray(found["experts"].share)) == (3,)


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    dead=st.integers(0, 3),
    rows=st.sampled_from([9, 40, 256]),
    seed=st.integers(0, 99),
)
def test_numbers_of_known_values(values, dead, rows, seed):
    """Directions drawn, values known: what is told of them is what their definitions say."""
    rank = len(values) + dead
    draw = np.random.default_rng(seed)
    u, v = (np.linalg.qr(draw.normal(size=(n, rank)))[0] for n in (rows, 12))
    known = np.array(sorted([*values, *[0.0] * dead], reverse=True))
    mix = draw.normal(size=(rank, rank)) + 3 * np.eye(rank)  # shares it out to both factors
    a, b = (u * known) @ mix, np.linalg.solve(mix, v.T)
    found = analysis.spectrum({"w": adapter(jnp.array(a), jnp.array(b))})["w"]
    assert_allclose(found.values, known, rtol=1e-4, atol=2e-5 * known[0])
    squares = known**2
    assert_allclose(found.energy, np.cumsum(squares) / squares.sum(), rtol=1e-4)
    left = np.sqrt(np.append(np.cumsum(squares[::-1])[::-1][1:], 0) / squares.sum())
    assert_allclose(found.left, left, atol=1e-3)
    assert_allclose(found.stable_rank, squares.sum() / squares[0], rtol=1e-4)
    p = known[known > 0] / known.sum()
    assert_allclose(found.effective_rank, np.exp(-(p * np.log(p)).sum()), rtol=1e-2)
    enough = 1 + int(np.sum(np.cumsum(squares) / squares.sum() < 0.5))
    assert abs(int(found.rank_for(0.5)) - enough) <= 1


def test_directions_that_do_nothing_are_counted():
    a, b = normal(0, 2, 20, 5), normal(1, 2, 5, 9)
    b = b.at[1, 2:].set(0)
    found = analysis.spectrum({"w": adapter(a, b)})["w"]
    assert_array_equal(found.dead, [0, 3])
    nothing = analysis.spectrum({"w": adapter(a, 0 * b)})["w"]
    for number in ("norm", "effective_rank", "stable_rank", "energy", "left"):
        assert_array_equal(getattr(nothing, number), 0)
    assert_array_equal(nothing.dead, 5)


def test_a_rank_above_a_side_has_zeros_behind():
    found = analysis.spectrum({"w": adapter(normal(0, 3, 5), normal(1, 5, 9))})["w"]
    assert found.values.shape == (5,)
    assert_array_equal(found.values[3:], 0)


def test_parts_and_what_is_trained_itself():
    params = {"qkv": normal(0, 8, 12), "bias": normal(1, 12)}
    x = normal(2, 5, 8)

    def fn(params, x):
        return x @ params["qkv"] + params["bias"][None]

    config = jaxlora.LoRAConfig(
        rank=2, targets=["qkv[:, 0:4]", "qkv[:, 8:12]"], train=("bias",), magnitude=True
    )
    adapted = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    base, adapters = jaxlora.split(jax.tree.map(lambda leaf: leaf + 0.1, adapted))
    found = analysis.spectrum(adapters, base)
    assert [*found] == ["qkv[:, 0:4]", "qkv[:, 8:12]"]
    assert found.left_out == ("bias",)
    assert "not looked at: bias" in str(found)
    weight = np.linalg.norm(base["qkv"][:, 8:12])
    assert_allclose(np.asarray(found["qkv[:, 8:12]"].weight_norm), weight, rtol=1e-6)


def test_table_folds_layers_and_a_path_that_is_not_there_is_told():
    one = adapter(normal(0, 8, 2), normal(1, 2, 6))
    found = analysis.spectrum({f"block_{i}/w": one for i in range(3)})
    assert "block_{0..2}/w x3" in str(found)
    with pytest.raises(KeyError, match="nothing was found of 'block_7/w'; nearest"):
        found["block_7/w"]
    assert jax.tree.structure(found) == jax.tree.structure(jax.tree.map(jnp.copy, found))


@pytest.mark.parametrize(
    ("given", "base", "message"),
    [
        ({}, None, "params has no adapted weight"),
        ({"w": normal(0, 3, 3)}, None, "params has no adapted weight"),
        ({"bias": jaxlora.weights.Replacement(normal(0, 3), (3,))}, None, "must hold factors"),
        ({"v": adapter(normal(0, 3, 1), normal(1, 1, 3))}, {"w": normal(0, 3, 3)}, "no leaf 'v'"),
    ],
)
def test_what_has_no_spectrum_is_refused(given, base, message):
    with pytest.raises(ValueError, match=message):
        analysis.spectrum(given, base)


def test_one_program_serves_adapters_of_one_shape():
    one = adapter(normal(0, 8, 2), normal(1, 2, 6))
    other = dataclasses.replace(one, a=one.a + 1)
    base, adapters = {"u": normal(2, 8, 6), "v": normal(3, 8, 6)}, {"u": one, "v": other}
    _, known = jaxlora.split(jaxlora.bind(base, adapters))  # each knows its own base
    compiled: Any = spectra._spectrum
    analysis.spectrum({"u": known["u"]})
    before = compiled._cache_size()
    analysis.spectrum({"v": known["v"]})
    assert compiled._cache_size() == before


def test_a_rank_is_none_of_a_zero_and_at_most_that_of_the_adapter():
    a, b = np.ones((2, 5, 3), np.float32), np.zeros((2, 3, 4), np.float32)
    b[1] = np.random.default_rng(0).normal(size=(3, 4))
    found = analysis.spectrum({"w": adapter(a + np.eye(5, 3), b)})["w"]
    assert_array_equal(found.rank_for(0.9)[0], 0)
    assert 1 <= found.rank_for(1.0)[1] <= 3


def test_nan_is_told_as_nan():
    a, b = np.ones((5, 2), np.float32), np.full((2, 4), np.nan, np.float32)
    found = analysis.spectrum({"w": adapter(a, b)}, {"w": np.ones((5, 4), np.float32)})["w"]
    assert found.share is not None
    for value in (found.norm, found.stable_rank, found.effective_rank, found.share):
        assert np.isnan(value)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("part", ["[0:64]", "[64:128]", "[0:32, 8:24]", "[:, 8:24]"])
def test_parts_of_quantized_weights_are_those_of_their_values(kind, part):
    def fn(params, x):
        return x @ params["w"]

    params, x = {"w": normal(0, 128, 64)}, normal(1, 2, 128)
    config = jaxlora.QuantizationConfig(kind, block_size=64)
    quantized = jaxlora.quantize(fn, params, x, config=config)
    config = jaxlora.LoRAConfig(rank=2, targets=(f"w{part}",))
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), fn, quantized, x, config=config))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    plain = jaxlora.dequantize(base)
    (name,) = adapters
    norms: list[Any] = [
        analysis.spectrum(jaxlora.bind(tree, adapters, check_base=False))[name].weight_norm
        for tree in (base, plain)
    ]
    assert_allclose(*norms, rtol=1e-5)
