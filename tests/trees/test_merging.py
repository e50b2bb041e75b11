"""Merging beyond the laws: memory, and what rounding loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora


def adapted(key, dtype="float32"):
    def fn(params, x):
        return x @ params["up"] @ params["down"] + params["bias"]

    params = {"up": normal(0, 4, 8), "down": normal(1, 8, 4), "bias": normal(2, 4)}
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    config = jaxlora.LoRAConfig(rank=2)
    params = jaxlora.init(key, fn, params, normal(3, 4).astype(dtype), config=config)
    return jax.tree.map(lambda x: x + 1, params)


def test_donated_weights_are_given_up_and_no_others(key):
    params, same = adapted(key), adapted(key)
    got = jaxlora.merge(params, donate=True)
    jax.tree.map(assert_array_equal, got, jaxlora.merge(same))
    assert params["up"].base.is_deleted()
    assert params["down"].base.is_deleted()
    assert not params["bias"].is_deleted()
    assert not params["up"].a.is_deleted()
    assert not same["up"].base.is_deleted()


def test_a_donated_weight_that_is_not_finite_is_named(key):
    params = adapted(key)
    params = {**params, "up": dataclasses.replace(params["up"], base=jnp.full((4, 8), jnp.nan))}
    with pytest.raises(ValueError, match="the merged weight 'up' is not finite: base hold NaN"):
        jaxlora.merge(params, donate=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_error_is_the_largest_that_rounding_makes(key, dtype):
    params = adapted(key, dtype)
    plain, errors = jaxlora.merge(params), jaxlora.merge_error(params)
    assert errors.keys() == {"down", "up"}
    for path, node in params.items():
        if path in errors:
            a, b = (np.asarray(factor, np.float64) for factor in (node.a, node.b))
            exact = np.asarray(node.base, np.float64) + node.alpha / node.rank * a @ b
            error = np.abs(np.asarray(plain[path], np.float64) - exact).max()
            assert_allclose(errors[path], error, rtol=1e-2, atol=1e-5)
            assert (errors[path] > 0) == (dtype != "float32")
    jitted = jax.jit(jaxlora.merge_error)(params)
    jax.tree.map(lambda x, y: assert_allclose(x, y, atol=1e-5), jitted, errors)


def test_error_of_what_is_not_finite_is_refused_as_its_merge(key):
    params = adapted(key)
    params = {**params, "up": dataclasses.replace(params["up"], base=jnp.full((4, 8), jnp.nan))}
    for call in (jaxlora.merge, jaxlora.merge_error):
        with pytest.raises(ValueError, match="the merged weight 'up' is not finite: base hold NaN"):
            call(params)
        with pytest.raises(TypeError, match=rf"{call.__name__}\(bind\(base, adapters\)\)"):
            call(jaxlora.split(params)[1])
