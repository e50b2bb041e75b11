"""Merging beyond the laws: memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from cases import normal
from numpy.testing import assert_array_equal

import jaxlora


def adapted(key):
    def fn(params, x):
        return x @ params["up"] @ params["down"] + params["bias"]

    params = {"up": normal(0, 4, 8), "down": normal(1, 8, 4), "bias": normal(2, 4)}
    config = jaxlora.LoRAConfig(rank=2)
    params = jaxlora.init(key, fn, params, normal(3, 4), config=config)
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
