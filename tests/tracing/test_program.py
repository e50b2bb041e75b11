"""The walk itself: what it keeps of a program, and that it is never silent."""

import functools
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from cases.base import adapted
from cases.layers_linen import linen_attention
from cases.products import matmul
from counts import op_names
from jax.test_util import check_grads
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora

X = normal(1, 5, 8)


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


def looped(params, x):
    for w in params["w"]:  # `unstack`, or slices, by the version of JAX
        x = jnp.tanh(x @ w)
    for w in jnp.unstack(params["v"], axis=1):
        x = jnp.tanh(x @ w)
    return x


def test_a_python_loop_over_a_stack_stays_low_rank():
    base = {"w": normal(0, 3, 8, 8), "v": normal(1, 8, 2, 8)}
    sites = jaxlora.find_sites(looped, base, X)
    assert {site.path: site.stack for site in sites} == {"w": (0,), "v": (1,)}
    params = adapted(looped, base, X)
    got = jaxlora.lora(looped, strict=True)(params, X)
    assert_allclose(got, looped(jaxlora.merge(params), X), rtol=1e-5, atol=1e-6)


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
    names = op_names(jaxlora.lora(case.fn), case.init(jax.random.key(0)), *case.args)
    assert any(name.endswith("query/dot_general") for name in names)
    assert any(
        re.search(r"query/lora/(jit\((chain|narrow)\)/)*dot_general$", name) for name in names
    )


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
    assert sites["w"].roles == jaxlora.weights.Roles((0,), (1,), (2,))


def test_functions_may_have_keywords_of_any_name(key):
    def fn(params, x, *, key, fn, params2=None):
        return x @ params["w"] + key.sum() + fn

    config = jaxlora.LoRAConfig(rank=2)
    params = {"w": normal(0, 8, 6)}
    params = jaxlora.init(key, fn, params, X, config=config, key=jnp.ones(2), fn=1.0)
    assert jaxlora.explain(fn, params, X, key=jnp.ones(2), fn=1.0).uses["w"]


def test_every_use_of_a_jitted_helper_is_explained():
    helper = jax.jit(lambda x, w: x @ w)
    params = adapted(lambda params, x: helper(helper(x, params["w"]), params["w"].T), *_square())
    report = jaxlora.explain(
        lambda params, x: helper(helper(x, params["w"]), params["w"].T), params, X
    )
    assert len(report.uses["w"]) == 2


def _square():
    return {"w": normal(0, 8, 8)}, X
