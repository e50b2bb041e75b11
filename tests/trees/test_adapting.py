"""What adapters are made from: shapes, NumPy arrays, traced weights."""

import jax
import numpy as np
from cases import normal
from cases.layers_linen import linen_attention
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora

X = normal(1, 5, 8)


def test_sites_and_adapters_need_only_shapes(key):
    case = linen_attention()
    shapes = jax.eval_shape(lambda: (case.params, case.args))
    params, args = shapes
    sites = jaxlora.find_sites(case.fn, params, *args)
    assert [site.path for site in sites] == list(jaxlora.split(case.init(key))[1])
    abstract = jax.eval_shape(
        lambda params, *args: jaxlora.init(key, case.fn, params, *args, config=case.config),
        params,
        *args,
    )
    assert jax.tree.structure(abstract) == jax.tree.structure(case.init(key))
    assert jaxlora.summary(abstract).trainable == jaxlora.summary(case.init(key)).trainable


def test_init_under_jit_gives_the_same_adapters(key):
    case = linen_attention()
    inside = jax.jit(
        lambda params, *args: jaxlora.init(key, case.fn, params, *args, config=case.config)
    )(case.params, *case.args)
    jax.tree.map(assert_array_equal, inside, case.init(key))
    whole = jax.jit(lambda params: jaxlora.bind(*jaxlora.split(params)))(inside)
    jax.tree.map(assert_array_equal, whole, inside)


def test_weights_may_be_numpy_arrays(key):
    case = linen_attention()
    params = jax.tree.map(np.asarray, case.trained(key))
    assert_allclose(
        jaxlora.lora(case.fn)(params, *case.args),
        case.fn(jaxlora.merge(params), *case.args),
        atol=1e-5,
    )


def test_explain_and_summary_need_only_shapes(key):
    case = linen_attention()
    params, args = jax.eval_shape(lambda: (case.init(key), case.args))
    assert str(jaxlora.explain(case.fn, params, *args)) == str(
        jaxlora.explain(case.fn, case.init(key), *case.args)
    )
    whole = jaxlora.summary(params)
    factors = jaxlora.summary(jaxlora.split(case.init(key))[1])
    assert factors.total == factors.trainable == whole.trainable
    assert str(jaxlora.summary({**params, "key": jax.random.key(0)})).count("\n") > 5
