"""The laws that every program keeps, each tried on every case of `cases`."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.weights import paths


def pytest_generate_tests(metafunc):
    """Try each law on each case; another list of cases imports the laws and has a hook as this."""
    if "make" in metafunc.fixturenames:
        metafunc.parametrize("make", parameters(cases.CASES))
    if "make_counted" in metafunc.fixturenames:
        counted = {name: make for name, make in cases.CASES.items() if make().tokens}
        metafunc.parametrize("make_counted", parameters(counted))
    if "compile" in metafunc.fixturenames:
        eager = pytest.param(lambda f: f, id="eager", marks=pytest.mark.once)
        metafunc.parametrize("compile", [eager, pytest.param(jax.jit, id="jit")])


def parameters(cases):
    """Return the cases as pytest takes them, with their names."""
    return [pytest.param(make, id=name) for name, make in cases.items()]


def arrays(tree):
    """Return the floating arrays of a tree, with every adapted weight merged."""
    tree = jax.tree.map(
        lambda leaf: jaxlora.merge(leaf) if isinstance(leaf, jaxlora.LoRAWeight) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, jaxlora.LoRAWeight),
    )
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def cache_size(fn):
    """Return how many times a jitted function was compiled."""
    return fn._cache_size()


def assert_close(got, wanted, epsilon, ulps):
    """Check that two trees agree within some rounding units of their largest element."""
    got, wanted = arrays(got), arrays(wanted)
    assert len(got) == len(wanted) > 0
    for x, y in zip(got, wanted, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=ulps * epsilon * (np.abs(y).max() + 1e-30))


def loss(fn, *args):
    """Return a scalar on which every floating output has an influence of its own."""

    def weighted(x):
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return jnp.sum(x.astype(jnp.float32) * weights)

    return sum(map(weighted, arrays(fn(*args))), jnp.float32(0))


def test_fresh_adapters_leave_the_output_equal(make, compile, key):
    case = make()
    got = compile(jaxlora.lora(case.fn, strict=True))(case.init(key), *case.args)
    wanted = compile(case.fn)(case.params, *case.args)
    if compile is jax.jit or case.compiled:
        assert_close(got, wanted, case.epsilon, ulps=4)
    else:
        for x, y in zip(arrays(got), arrays(wanted), strict=True):
            assert_array_equal(x, y)


def test_low_rank_output_equals_merged(make, compile, key):
    case = make()
    params = case.trained(key)
    got = compile(jaxlora.lora(case.fn, strict=True))(params, *case.args)
    wanted = case.fn(jaxlora.merge(params), *case.args)
    assert_close(got, wanted, case.epsilon, ulps=32)


def test_low_rank_gradients_equal_merged(make, key):
    check_gradients(make(), key)


@pytest.mark.once
def test_low_rank_gradients_equal_merged_on_other_platforms(make, key, as_on):
    as_on("tpu")
    check_gradients(make(), key)


def check_gradients(case, key):
    base, adapters = jaxlora.split(case.trained(key))

    def low_rank(adapters, args):
        return loss(jaxlora.lora(case.fn, strict=True), jaxlora.bind(base, adapters), *args)

    def merged(adapters, args):
        return loss(case.fn, jaxlora.merge(jaxlora.bind(base, adapters)), *args)

    grad = functools.partial(jax.grad, argnums=(0, 1), allow_int=True)
    got = jax.jit(grad(low_rank))(adapters, case.args)
    wanted = jax.jit(grad(merged))(adapters, case.args)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert_close(got, wanted, case.epsilon, ulps=128)


def test_merge_then_unmerge_gives_the_base_back(make, key):
    case = make()
    base, adapters = jaxlora.split(case.trained(key))
    merged = jaxlora.merge(jaxlora.bind(base, adapters))
    assert jax.tree.structure(merged) == jax.tree.structure(case.params)
    shapes = ([(x.shape, x.dtype) for x in arrays(tree)] for tree in (merged, case.params))
    assert next(shapes) == next(shapes)
    assert_close(jaxlora.unmerge(merged, adapters), base, case.epsilon, ulps=8)
    moved = [not np.array_equal(x, y) for x, y in zip(arrays(merged), arrays(base), strict=True)]
    assert sum(moved) == len(adapters)


def test_base_gets_no_gradient_and_no_optimizer_state(make, key):
    case = make()
    params = case.trained(key)
    fn = jaxlora.lora(case.fn)
    tx = jaxlora.freeze(optax.adamw(1e-2, weight_decay=0.1))

    @jax.jit
    def step(params):
        grads = jax.grad(lambda params: loss(fn, params, *case.args))(params)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
            updates, state = tx.update(grads, tx.init(params), params)
            return grads, optax.apply_updates(params, updates), state

    grads, updated, state = step(params)
    base_before, factors_before = jaxlora.split(params)
    base_after, factors_after = jaxlora.split(updated)
    for x, y in zip(jax.tree.leaves(base_after), jax.tree.leaves(base_before), strict=True):
        assert_array_equal(x, y)
    for node in paths.flatten(grads)[0].values():
        assert not isinstance(node, jaxlora.LoRAWeight) or not np.asarray(node.base, bool).any()
    for x, y in zip(jax.tree.leaves(factors_after), jax.tree.leaves(factors_before), strict=True):
        assert not np.array_equal(x, y)
    factors = sum(x.size for x in jax.tree.leaves(factors_before))
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * factors


def test_same_key_gives_the_same_adapters(make, key):
    case = make()
    (_, one), (_, two) = jaxlora.split(case.init(key)), jaxlora.split(case.fresh(key))
    _, other = jaxlora.split(case.init(jax.random.key(1)))
    for path in one:
        assert_array_equal(one[path].a, two[path].a)
        assert not np.array_equal(one[path].a, other[path].a)
        assert not np.asarray(one[path].b, bool).any()
        roles, shape = one[path].roles, one[path].shape
        assert (one[path].a.shape, one[path].b.shape) == roles.factor_shapes(shape, case.rank)


def test_one_target_more_changes_no_other(make, key):
    case = make()
    _, all_adapters = jaxlora.split(case.init(key))
    for path in all_adapters:
        config = jaxlora.LoRAConfig(rank=case.rank, alpha=3.0, targets=(path,))
        params = jaxlora.init(key, case.fn, case.params, *case.args, config=config)
        _, adapters = jaxlora.split(params)
        assert list(adapters) == [path]
        assert_array_equal(adapters[path].a, all_adapters[path].a)


def test_no_more_operations_than_the_factors_need(make_counted, compiled, key):
    case = make_counted()
    params = case.init(key)

    told = jaxlora.explain(case.fn, params, *case.args)
    extra = outputs = 0
    for path, node in paths.flatten(params)[0].items():
        if path in case.tokens:
            _, in_, out = (np.prod(sizes) for sizes in node.roles.sizes(node.shape))
            extra += 2 * case.tokens[path] * case.rank * (in_ + out)
            outputs += case.tokens[path] * out  # the sum
            outputs += node.b.size  # scaled
    base = compiled(case.fn, case.params, *case.args).cost_analysis()["flops"]
    low_rank = compiled(jaxlora.lora(case.fn), params, *case.args).cost_analysis()["flops"]
    assert low_rank == pytest.approx(base + extra + outputs, rel=0.01)
    # here a factor is scaled at every use of its weight
    assert told.cost.flops == pytest.approx(extra + outputs, rel=0.05)


def test_adapters_of_equal_shape_compile_once(make, key):
    case = make()
    fn = jax.jit(jaxlora.lora(case.fn))
    first = jax.tree.leaves(fn(case.init(key), *case.args))
    second = jax.tree.leaves(fn(case.trained(jax.random.key(5)), *case.args))
    assert cache_size(fn) == 1
    assert any(not np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_saved_adapters_load_bit_equal(make, key, tmp_path):
    case = make()
    base, adapters = jaxlora.split(case.trained(key))
    jaxlora.save_adapters(tmp_path / "adapters", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    assert list(loaded) == list(adapters)
    jax.tree.map(assert_array_equal, loaded, adapters)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)


def test_explain_finds_every_use_low_rank(make, key):
    case = make()
    report = jaxlora.explain(case.fn, case.init(key), *case.args)
    assert not report.materialized
    assert all(report.uses.values())


def test_operations_of_a_layer_of_real_size(compiled, key):
    """The base's operations plus 2 tokens rank (in + out) for each site, within 1 %."""
    tokens, rank, width, hidden = 1024, 8, 384, 1536

    def fn(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    params = {"up": jnp.zeros((width, hidden)), "down": jnp.zeros((hidden, width))}
    x = jnp.zeros((8, tokens // 8, width))
    config = jaxlora.LoRAConfig(rank=rank)
    adapted = jaxlora.init(key, fn, params, x, config=config)
    extra = 2 * (2 * tokens * rank * (width + hidden))
    base = compiled(fn, params, x).cost_analysis()["flops"]
    low_rank = compiled(jaxlora.lora(fn), adapted, x).cost_analysis()["flops"]
    assert low_rank == pytest.approx(base + extra, 0.01)
