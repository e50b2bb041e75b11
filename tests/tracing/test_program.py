"""The walk itself: what it keeps of a program, and that it is never silent."""

import dataclasses
import functools
import re
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, normal
from cases.layers_linen import linen_attention, linen_layers_scanned
from cases.products import matmul
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora.tracing.values import axes

X = normal(1, 5, 8)


def adapted(fn, params, *args, **config):
    config = jaxlora.LoRAConfig(**{"rank": 2, "alpha": 3.0, **config})
    base, adapters = jaxlora.split(
        jaxlora.init(jax.random.key(0), fn, params, *args, config=config)
    )
    return jaxlora.bind(base, jax.tree.map(lambda x: x + 0.1, adapters))


def regularized(params, x):
    return x @ params["w"] + jnp.sum(params["w"] ** 2)


def test_operation_without_a_rule_is_correct_and_never_silent():
    params = adapted(regularized, {"w": normal(0, 8, 6)}, X)
    with pytest.warns(
        jaxlora.MaterializationWarning,
        match=r"the weight 'w' reaches 'integer_pow' at .*test_program.py:\d+.* materialized",
    ) as told:
        got = jaxlora.lora(regularized)(params, X)
    assert [warning.filename for warning in told] == [__file__]
    assert_allclose(got, regularized(jaxlora.merge(params), X), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'integer_pow' .* strict=True needs a low-rank rule"):
        jaxlora.lora(regularized, strict=True)(params, X)
    report = jaxlora.explain(regularized, params, X)
    assert [use.operation for use in report.materialized["w"]] == ["integer_pow"]
    assert "dot_general (contracted)" in str(report)
    assert "has no low-rank rule" in str(report)
    assert report.cost.flops >= 2 * 8 * 6 * params["w"].rank  # at least the dense a b


def here(fn):
    """Return the line of the body of a function of two lines."""
    return fn.__code__.co_firstlineno + 1


def test_functions_of_jax_are_told_at_the_line_that_calls_them():
    params = adapted(lambda p, x: x @ p["w"], {"w": normal(0, 8, 8)}, X)

    def plain(p, x):
        return jnp.linalg.svd(p["w"])[1]

    def jitted(p, x):
        return jax.jit(lambda w: jnp.linalg.svd(w)[1])(p["w"])

    def activated(p, x):
        return jax.nn.relu(p["w"])

    for fn in (plain, jitted, activated, plain, jitted):
        with pytest.warns(jaxlora.MaterializationWarning, match="the weight 'w' reaches") as told:
            jaxlora.lora(fn)(params, X)
        assert {(warning.filename, warning.lineno) for warning in told} == {(__file__, here(fn))}


def test_function_with_its_own_vjp_takes_the_weight_dense_and_says_so():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))

    def fn(params, x):
        return product(x @ params["a"], params["b"])

    params = adapted(fn, {"a": normal(0, 8, 8), "b": normal(1, 8, 6)}, X, targets=("a",))
    jaxlora.lora(fn, strict=True)(params, X)
    sites = jaxlora.find_sites(fn, {"a": normal(0, 8, 8), "b": normal(1, 8, 6)}, X)
    assert "custom_vjp_call" in sites.skipped["b"]


def test_only_arrays_are_traced():
    seen = []

    def fn(params, x, flag, name, *, scale=1, nothing=None):
        seen.append((flag, name, scale, nothing))
        return x @ params["w"] if flag else x

    params = adapted(fn, {"w": normal(0, 8, 6)}, X, True, "relu")
    seen.clear()
    jaxlora.lora(fn)(params, X, True, "relu", scale=2)
    assert set(seen) == {(True, "relu", 2, None)}
    assert jaxlora.lora(fn)(params, X, False, "relu").shape == X.shape


def test_plain_arguments_go_to_the_function_itself():
    assert jaxlora.lora(lambda params, x: (params, "as it is"))({"w": 1}, 2) == (
        {"w": 1},
        "as it is",
    )


def test_collections_and_random_keys_survive():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    model = Model()
    variables = model.init(jax.random.key(0), X, train=False)
    call = functools.partial(
        model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
    )
    params = adapted(call, variables, X)
    y, updated = jaxlora.lora(call)(params, X)
    wanted, wanted_updated = call(jaxlora.merge(params), X)
    assert_allclose(y, wanted, atol=1e-6)
    jax.tree.map(functools.partial(assert_allclose, atol=1e-6), updated, wanted_updated)
    assert np.asarray(updated["batch_stats"]["BatchNorm_0"]["mean"]).any()


def test_side_effects_happen_once_and_in_order(capsys):
    def fn(params, x):
        jax.debug.print("before", ordered=True)
        y = x @ params["w"]
        jax.debug.print("after {}", y.shape[0], ordered=True)
        return y

    params = adapted(fn, {"w": normal(0, 8, 6)}, X)
    capsys.readouterr()
    jax.jit(jaxlora.lora(fn))(params, X).block_until_ready()
    jax.effects_barrier()
    assert capsys.readouterr().out == "before\nafter 5\n"


def test_scopes_of_the_model_survive():
    case = linen_attention()
    text = jax.jit(jaxlora.lora(case.fn)).lower(case.init(jax.random.key(0)), *case.args)
    names = text.as_text(debug_info=True)
    assert "query/dot_general" in names
    assert re.search(r"query/lora/(jit\(chain\)/)?dot_general", names)


def test_transforms_compose_outside(key):
    case = linen_attention()
    params = case.trained(key)
    (x,) = case.args
    fn, plain = jaxlora.lora(case.fn), jaxlora.merge(params)
    each = jax.vmap(fn, (None, 0))(params, x)
    assert_allclose(each, jax.vmap(case.fn, (None, 0))(plain, x), atol=1e-5)
    _, moved = jax.jvp(lambda x: fn(params, x), (x,), (x,))
    _, wanted = jax.jvp(lambda x: case.fn(plain, x), (x,), (x,))
    assert_allclose(moved, wanted, atol=1e-5)
    remat = jax.checkpoint(fn)
    assert_allclose(remat(params, x), case.fn(plain, x), atol=1e-5)
    base, adapters = jaxlora.split(params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapters)
    many = jax.vmap(lambda adapters: fn(jaxlora.bind(base, adapters), x))(stacked)
    assert_allclose(many[0], fn(params, x), atol=1e-5)

    def loss(adapters):
        return jnp.sum(jnp.sin(fn(jaxlora.bind(base, adapters), x)))

    def dense_loss(adapters):
        return jnp.sum(jnp.sin(case.fn(jaxlora.merge(jaxlora.bind(base, adapters)), x)))

    def hessian_product(loss):
        return jax.jvp(jax.grad(loss), (adapters,), (adapters,))[1]

    close = functools.partial(assert_allclose, atol=1e-3)
    jax.tree.map(close, hessian_product(loss), hessian_product(dense_loss))


def test_gradient_agrees_with_finite_differences(key):
    case = linen_attention()
    base, adapters = jaxlora.split(case.trained(key))

    def loss(adapters):
        return jnp.sum(jnp.sin(jaxlora.lora(case.fn)(jaxlora.bind(base, adapters), *case.args)))

    check_grads(loss, (adapters,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_product_agrees_with_numpy(key):
    node = matmul().trained(key)["w"]
    w, a, b = (np.asarray(x, np.float64) for x in (node.base, node.a, node.b))
    x = np.asarray(matmul().args[0], np.float64)
    got = jaxlora.lora(matmul().fn)({"w": node}, *matmul().args)
    assert_allclose(got, x @ w + 3.0 / 2 * (x @ a) @ b, rtol=1e-4, atol=1e-5)


def test_weight_looked_up_out_of_range_is_filled_as_without_adapters():
    def fn(params, i):
        return jnp.take(params["table"], i, axis=0, mode="fill", fill_value=7.0)

    indices = jnp.array([0, 99, 3])
    params = adapted(fn, {"table": normal(0, 9, 6)}, indices, targets=("table",))
    got = jaxlora.lora(fn, strict=True)(params, indices)
    assert_allclose(got, fn(jaxlora.merge(params), indices), atol=1e-6)
    assert_array_equal(got[1], jnp.full(6, 7.0))


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


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_axes_follow_any_reshape_and_transpose(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    dims = axes.from_shape(sizes, range(len(sizes)))
    index = np.indices(sizes)
    where = [index[i] for i in range(len(sizes))]  # of each element, its index along each axis
    for _ in range(data.draw(st.integers(1, 4))):
        shape = where[0].shape
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(shape))))
            dims, where = tuple(dims[d] for d in order), [w.transpose(order) for w in where]
        else:
            ones = [1] * len(shape) if len(shape) < 16 else []  # NumPy has at most 64 dimensions
            factors = data.draw(st.permutations([*shape, *ones]))
            new = axes.reshape(dims, factors)
            if new is None:
                continue
            dims, where = new, [w.reshape(factors) for w in where]
        assert axes.shape(dims) == where[0].shape
        for d, dim in enumerate(dims):
            along = np.moveaxis(np.stack(where), d + 1, 0)
            moves = {i for i in range(len(sizes)) if (along[1:, i] != along[:-1, i]).any()}
            assert moves <= axes.labels([dim])


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


def test_import_loads_neither_orbax_nor_optax_and_starts_no_backend():
    code = (
        "import sys, jaxlora; from jax._src import xla_bridge; "
        "assert not {'orbax', 'optax', 'flax'} & set(sys.modules); "
        "assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_index_out_of_range_is_clamped_as_without_adapters(key):
    def fn(params, x, i):
        return x @ params["w"][i]

    params = adapted(fn, {"w": normal(0, 4, 8, 6)}, X, jnp.int32(0))
    for i in (-5, -1, 0, 3, 9):
        got = jaxlora.lora(fn, strict=True)(params, X, jnp.int32(i))
        assert_allclose(got, fn(jaxlora.merge(params), X, jnp.int32(i)), atol=1e-5)


def test_part_of_a_weight_that_is_not_looked_up_is_not_taken_dense_in_silence():
    def fn(params, x):
        return x @ jnp.tanh(params["w"][1:]) + x @ params["w"][1:]

    params = adapted(fn, {"w": normal(0, 9, 6)}, X)
    with pytest.raises(ValueError, match="the weight 'w' reaches 'tanh'"):
        jaxlora.lora(fn, strict=True)(params, X)


def test_bias_of_unrolled_layers_is_no_site():
    def fn(params, x):
        for i in range(2):
            x = x @ params["w"][i] + params["bias"][i][None]
        return x

    params = {"w": normal(0, 2, 8, 8), "bias": normal(1, 2, 8)}
    sites = jaxlora.find_sites(fn, params, X)
    assert [site.path for site in sites] == ["w"]
    assert sites["w"].roles == jaxlora.Roles((0,), (1,), (2,))


def test_fields_named_value_have_paths_of_their_own():
    @functools.partial(jax.tree_util.register_dataclass)
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    params = {"attention": Attention(normal(0, 8, 6), normal(1, 8, 6))}

    def fn(params, x):
        return x @ params["attention"].query + x @ params["attention"].value

    sites = jaxlora.find_sites(fn, params, X)
    assert [site.path for site in sites] == ["attention/query", "attention/value"]


def test_boxes_add_nothing_to_a_path():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(6, kernel_init=kernel_init)
    variables = model.init(jax.random.key(0), X)
    sites = jaxlora.find_sites(model.apply, variables, X)
    assert [site.path for site in sites] == ["params/kernel"]
    params = adapted(model.apply, variables, X)
    got: Any = jaxlora.lora(model.apply)(params, X)
    wanted: Any = model.apply(jaxlora.merge(params), X)
    assert_allclose(got, wanted, atol=1e-5)


def test_functions_may_have_keywords_of_any_name(key):
    def fn(params, x, *, key, fn, params2=None):
        return x @ params["w"] + key.sum() + fn

    config = jaxlora.LoRAConfig(rank=2)
    params = {"w": normal(0, 8, 6)}
    params = jaxlora.init(key, fn, params, X, config=config, key=jnp.ones(2), fn=1.0)
    assert jaxlora.explain(fn, params, X, key=jnp.ones(2), fn=1.0).uses["w"]


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


def test_dropout_takes_keys_of_both_kinds(key):
    params = adapted(lambda params, x: x @ params["w"], {"w": normal(0, 8, 6)}, X)
    old = jaxlora.dropout(params, jax.random.PRNGKey(3), 0.5)
    new = jaxlora.dropout(params, jax.random.key(3), 0.5)
    fn = jaxlora.lora(lambda params, x: x @ params["w"])
    assert_array_equal(fn(old, X), fn(new, X))


def test_every_use_of_a_jitted_helper_is_explained():
    helper = jax.jit(lambda x, w: x @ w)
    params = adapted(lambda params, x: helper(helper(x, params["w"]), params["w"].T), *_square())
    report = jaxlora.explain(
        lambda params, x: helper(helper(x, params["w"]), params["w"].T), params, X
    )
    assert len(report.uses["w"]) == 2


def _square():
    return {"w": normal(0, 8, 8)}, X
