"""Dropout on the input of the low-rank path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, normal
from cases.base import adapted
from cases.layers_linen import linen_layers_scanned
from cases.products import matmul
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora

X = normal(1, 5, 8)


class TestDropout:
    def outputs(self, case, rate, seed):
        params = case.trained(jax.random.key(0))
        fn = jax.jit(jaxlora.lora(case.fn))
        dropped = jaxlora.dropout(params, jax.random.key(seed), rate)
        return np.asarray(fn(params, *case.args)), np.asarray(fn(dropped, *case.args))

    def test_concerns_the_low_rank_input_alone(self):
        x = jnp.ones((2000, 8))
        case = Case(lambda params, x: x @ params["w"], {"w": normal(0, 8, 6)}, (x,))
        base = np.asarray(case.fn(case.params, x))
        undropped, dropped = self.outputs(case, 0.25, 1)
        assert np.abs(dropped - undropped).max() > 0.1
        assert_allclose(dropped.mean(0), undropped.mean(0), atol=0.1)
        _, almost_all = self.outputs(case, 0.99, 1)
        untouched = (almost_all == base).all(1).mean()
        assert untouched == pytest.approx(0.99**8, abs=0.02)

    def test_is_off_at_rate_zero(self):
        assert_array_equal(*self.outputs(matmul(), 0.0, 1))

    def test_follows_its_key(self):
        _, one = self.outputs(matmul(), 0.5, 1)
        _, again = self.outputs(matmul(), 0.5, 1)
        _, other = self.outputs(matmul(), 0.5, 2)
        assert_array_equal(one, again)
        assert not np.array_equal(one, other)

    def test_differs_between_layers_of_a_stack(self):
        params = jax.tree.map(
            lambda w: jnp.stack([w[0]] * len(w)) if w.ndim > 1 else w,
            linen_layers_scanned().init(jax.random.key(0)),
        )
        dropped = jaxlora.dropout(params, jax.random.key(1), 0.5)
        keys = dropped["params"]["block"]["up"]["kernel"].dropout_keys
        assert len(np.unique(jax.random.key_data(keys), axis=0)) == 3

    def test_differs_between_steps_that_share_a_weight(self):
        def fn(params, x):
            return jax.lax.scan(lambda _, x: (None, x @ params["w"]), None, jnp.stack([x, x]))[1]

        params = adapted(fn, {"w": normal(0, 8, 6)}, X)
        y = jaxlora.lora(fn)(jaxlora.dropout(params, jax.random.key(1), 0.5), X)
        assert not jnp.array_equal(y[0], y[1])


def test_dropout_takes_keys_of_both_kinds(key):
    params = adapted(lambda params, x: x @ params["w"], {"w": normal(0, 8, 6)}, X)
    old = jaxlora.dropout(params, jax.random.PRNGKey(3), 0.5)
    new = jaxlora.dropout(params, jax.random.key(3), 0.5)
    fn = jaxlora.lora(lambda params, x: x @ params["w"])
    assert_array_equal(fn(old, X), fn(new, X))
