"""Programs at the edges of rules: sums of weights, one group, literals, three weights at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from cases.base import trained
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora

X = normal(0, 4, 8)


def adapted(fn, params, *args, **config) -> Any:
    config = jaxlora.LoRAConfig(**{"rank": 2, "alpha": 3.0, **config})
    tree = jaxlora.init(jax.random.key(0), fn, params, *args, config=config)
    base, adapters = jaxlora.split(tree)
    return base, trained(jax.random.key(1), adapters)


def is_node(x):
    return isinstance(x, jaxlora.LoRAWeight)


def assert_equals_merged(fn, params, *args, **config):
    """Check outputs, and gradients of their squares, against those of merged weights."""
    base, adapters = adapted(fn, params, *args, **config)

    def outputs(fn, tree):
        outs = jax.tree.leaves(fn(tree, *args), is_leaf=is_node)
        return [jaxlora.merge(x) if is_node(x) else x for x in outs]

    def low(adapters):
        return outputs(jaxlora.lora(fn), jaxlora.bind(base, adapters))

    def merged(adapters):
        return outputs(fn, jaxlora.merge(jaxlora.bind(base, adapters)))

    def squared(outputs):
        return lambda adapters: sum(jnp.sum(x**2) for x in outputs(adapters))

    for make in (lambda f: f, lambda f: jax.grad(squared(f))):
        got, wanted = (jax.jit(make(f))(adapters) for f in (low, merged))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert_allclose(x, y, rtol=1e-4, atol=1e-4 * (1 + float(jnp.abs(y).max())))


@pytest.mark.filterwarnings("error")
def test_sums_of_a_weight_are_arrays():
    def fn(params, x):
        w = params["w"]
        told = {"mean": w.mean(), "columns": w.sum(0), "rows": 2 * w.sum(1)}
        return jnp.mean((x @ w) ** 2) + 1e-3 * w.sum(), told

    params = {"w": normal(1, 8, 6)}
    assert_equals_merged(fn, params, X)
    base, adapters = adapted(fn, params, X)
    loss, told = jaxlora.lora(fn, strict=True)(jaxlora.bind(base, adapters), X)
    assert all(isinstance(x, jax.Array) for x in (loss, *told.values()))
    assert jax.grad(lambda a: jaxlora.lora(fn)(jaxlora.bind(base, a), X)[0])(adapters)


@pytest.mark.parametrize("sizes", [(3,), (1, 2)])
def test_rows_of_no_group_have_no_product(sizes):
    def fn(params, x):
        return lax.ragged_dot(x, params["w"], jnp.array(sizes))

    params = {"w": normal(1, len(sizes), 8, 6)}
    assert_equals_merged(fn, params, X)
    base, adapters = adapted(fn, params, X)
    assert_array_equal(jaxlora.lora(fn)(jaxlora.bind(base, adapters), X)[3:], 0)


@pytest.mark.parametrize("filling", [0.0, 2.0, None])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_rows_out_of_range_of_a_quantized_table_are_what_they_are_filled_with(kind, filling):
    def fn(params, ids):
        return jnp.take(params["table"], ids, axis=0, mode="fill", fill_value=filling)

    params, ids = {"table": normal(1, 20, 256)}, jnp.array([0, 20, 3])
    config = jaxlora.QuantizationConfig(kind, block_size=64, targets=("table",))
    quantized = jaxlora.quantize(fn, params, ids, config=config)
    found = jaxlora.lora(fn)(quantized, ids)
    assert_array_equal(found[1], np.full(256, np.nan if filling is None else filling))
    assert_allclose(found[0], jaxlora.dequantize(quantized)["table"][0], rtol=1e-6)


def test_a_function_with_a_derivative_of_its_own_drops_what_others_do():
    @jax.custom_jvp
    def product(x, w):
        return 2.0 * (x @ w)

    @product.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return product(x, w), 2.0 * (dx @ w + x @ dw)

    def fn(params, x):
        return product(x, params["w"])

    def plain(params, x):
        return 2.0 * (x @ params["w"])

    base, adapters = adapted(plain, {"w": normal(1, 8, 6)}, X)

    def loss(fn, adapters):
        tree = jaxlora.dropout(jaxlora.bind(base, adapters), jax.random.key(3), 0.5)
        return jnp.sum(jaxlora.lora(fn)(tree, X) ** 2)

    got, wanted = (jax.grad(lambda a, f=f: loss(f, a))(adapters) for f in (fn, plain))
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-4), got, wanted)


def test_a_product_and_an_adapted_weight_are_split_together():
    def fn(params, x, i):
        return (x @ params["w"] + params["t"]).reshape(4, 2, 3), params["t"][i]

    params = {"w": normal(1, 8, 6), "t": normal(2, 4, 6)}
    assert_equals_merged(fn, params, X, jnp.array([1, 3]), targets=("w", "t"))


def test_literals_are_selected_by_and_from():
    def fn(params, x):
        w = params["w"]
        total = lax.select(x[0, 0] > 0, w.sum(), 0.0)
        return x @ lax.select(True, w, lax.stop_gradient(w)), total

    base, adapters = adapted(lambda p, x: x @ p["w"], {"w": normal(1, 8, 6)}, X)
    with pytest.warns(jaxlora.MaterializationWarning):
        got = jaxlora.lora(fn)(jaxlora.bind(base, adapters), X)
    wanted = fn(jaxlora.merge(jaxlora.bind(base, adapters)), X)
    for x, y in zip(got, wanted, strict=True):
        assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::jaxlora.MaterializationWarning")
def test_a_weight_between_two_others_is_read_by_each_as_it_is():
    def fn(params):
        return params["big"] @ params["m"], params["small"] @ params["m"]

    params = {"big": normal(1, 64, 8), "m": normal(2, 8, 16), "small": normal(3, 4, 8)}
    assert_equals_merged(fn, params, targets=("big", "m", "small"))
