"""A module with adapters is a module: NNX itself calls, trains and stores it."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from modules import (
    CASES,
    CONFIG,
    Network,
    Sequential,
    X,
    close,
    copied,
    normal,
    pretrained,
)

import jaxlora
import jaxlora.nnx
from jaxlora.nnx import Adapted, Factor, Frozen, adapt

OF_FACTORS = nnx.DiffState(0, Factor)


def run(wrt):
    """Return a compiled function from a model to its output and gradients with respect to wrt."""

    @nnx.jit
    def run(model, x):
        def loss(model):
            out = model(x)
            return jnp.sum(jnp.sin(out)), out

        (_, out), grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt), has_aux=True)(
            model
        )
        return out, grads

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)
def test_adapted_is_the_merged_module(case):
    of_adapted, of_plain = run(Factor), run(nnx.Param)
    adapted = case.adapted()
    fresh, plain = copied(adapted), copied(adapted.model)
    close(of_adapted(fresh, case.x)[0], of_plain(plain, case.x)[0])
    close(nnx.state(fresh.model), nnx.state(plain))

    base = jax.tree.map(np.asarray, nnx.state(adapted.model, Frozen))
    merged = jaxlora.nnx.merge(pretrained(adapted))
    assert type(merged) is type(adapted.model)
    for _ in range(2):  # the second call starts from the state that the first has left
        out, grads = of_adapted(adapted, case.x)
        wanted, dense = of_plain(merged, case.x)
        close(out, wanted)
        others = nnx.Not(nnx.Any(nnx.Param, Frozen))
        close(nnx.state(adapted.model, others), nnx.state(merged, others))
        check_gradients(adapted, grads, dense)
    jax.tree.map(np.testing.assert_array_equal, base, nnx.state(adapted.model, Frozen))


def check_gradients(adapted, grads, dense):
    """Compare with the chain rule on the dense gradient of the merged weights."""
    dense = {"/".join(map(str, p)): g for p, g in nnx.to_flat_state(dense)}
    for path, adapter in adapted.adapters().items():
        roles, rank, dw = adapter.roles, 9, np.asarray(dense[path][...])
        a_axes = [*roles.stack, *roles.in_, rank]
        b_axes = [*roles.stack, rank, *roles.out]
        axes = list(range(dw.ndim))
        found = grads["factors"][path]
        close(found["a"][...], 2 * np.einsum(dw, axes, adapter.b, b_axes, a_axes), atol=1e-4)
        close(found["b"][...], 2 * np.einsum(dw, axes, adapter.a, a_axes, b_axes), atol=1e-4)


@pytest.fixture
def model():
    return Sequential()


def test_same_key_gives_what_the_functional_api_gives(model, key):
    graphdef, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    params = jaxlora.init(key, fn, state, X, config=CONFIG)
    adapted = adapt(key, model, X, config=CONFIG)
    assert jax.tree.structure(adapted.params()) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, adapted.params(), params)
    pretrained(adapted)
    np.testing.assert_array_equal(adapted(X), jaxlora.lora(fn)(adapted.params(), X))


def test_training_moves_the_factors_alone(model, key):
    model = Network(nnx.Rngs(0))
    adapted = adapt(key, model, X, config=CONFIG)
    optimizer = nnx.Optimizer(adapted, optax.adamw(1e-2), wrt=Factor)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(adapted, Factor)))
    assert size == 2 * (4 + 8) + 2 * (8 + 3)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(optimizer))) == 2 * size + 2
    base = jax.tree.map(np.asarray, nnx.state(adapted.model, Frozen))
    before = jax.tree.map(np.asarray, nnx.state(adapted, Factor))
    traces = []

    @nnx.jit
    def step(adapted, optimizer, x, y):
        def loss(adapted):
            traces.append(None)
            return jnp.mean((adapted(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=OF_FACTORS)(adapted)
        optimizer.update(adapted, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # Optax mixes int32 and float
        losses = [step(adapted, optimizer, X, normal(2, 5, 3)) for _ in range(30)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted.model, Frozen), base)
    moved = jax.tree.map(lambda x, y: (x != y).all(), before, nnx.state(adapted, Factor))
    assert all(jax.tree.leaves(moved))
    assert nnx.state(adapted.model, nnx.RngCount)["dropout"]["rngs"]["count"][...] == 30
    assert len(traces) == 1


def test_adapters_saved_and_loaded_give_the_same_module(model, key, tmp_path):
    adapted = pretrained(adapt(key, model, X, config=CONFIG))
    jaxlora.save_adapters(tmp_path / "adapters", adapted.adapters())
    adapters = jaxlora.load_adapters(tmp_path / "adapters", base=nnx.state(model))
    np.testing.assert_array_equal(Adapted(model, adapters)(X), adapted(X))


def test_other_adapters_do_not_recompile(model, key):
    traces = []

    @nnx.jit
    def run(adapted):
        traces.append(None)
        return adapted(X)

    other = Sequential(nnx.Rngs(5))
    outs = [run(pretrained(adapt(key, base, X, config=CONFIG))) for base in (model, other)]
    assert len(traces) == 1
    assert np.abs(outs[0] - outs[1]).min() > 0


def test_merged_shares_no_variable_with_the_adapted(key):
    adapted = adapt(key, Network(nnx.Rngs(0)), X, config=CONFIG)
    before = jax.tree.map(np.asarray, nnx.state(adapted.model, nnx.BatchStat))
    merged = jaxlora.nnx.merge(adapted)
    merged(X)
    nnx.update(merged, jax.tree.map(jnp.zeros_like, nnx.state(merged, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted.model, nnx.BatchStat), before)
    assert np.abs(adapted.model.last.kernel[...]).min() > 0


def test_adapting_draws_from_rngs_and_moves_no_state_of_the_model():
    model, rngs = Network(nnx.Rngs(0)), nnx.Rngs(params=3)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    adapted = adapt(rngs, model, X, config=CONFIG)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert rngs.params.count[...] == 1
    again = adapt(nnx.Rngs(params=3), model, X, config=CONFIG)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(adapted, Factor), nnx.state(again, Factor)
    )


def test_abstract_module_is_adapted(key):
    abstract = nnx.eval_shape(lambda: Network(nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    adapted = adapt(key, abstract, x, config=CONFIG)
    shapes = {path: (f.a.shape, f.b.shape) for path, f in adapted.factors.items()}
    assert shapes == {"first/kernel": ((4, 2), (2, 8)), "last/kernel": ((8, 2), (2, 3))}
    whole = nnx.eval_shape(lambda: adapt(key, Network(nnx.Rngs(0)), X, config=CONFIG))
    assert nnx.eval_shape(lambda model, x: model(x), whole, x).shape == (5, 3)


def test_mistakes_are_named(model, key):
    adapted = adapt(key, model, X, config=CONFIG)
    adapters = adapted.adapters()
    no_module: Any = jnp.tanh
    seed: Any = 7
    untyped: Any = adapt
    keys, plain = jax.random.split(key), jaxlora.nnx.merge(adapted)
    moved = {"up/kern": adapters["up/kernel"]}
    for mistake, error, message in [
        (
            lambda: adapt(key, no_module, X, config=CONFIG),
            TypeError,
            "flax.nnx.Module: got jitted|PjitFunction",
        ),
        (lambda: untyped(model, X, config=CONFIG), TypeError, "rngs, must be .* got Sequential"),
        (lambda: adapt(seed, model, X, config=CONFIG), TypeError, "pass flax.nnx.Rngs\\(7\\)"),
        (lambda: adapt(keys, model, X, config=CONFIG), TypeError, "rngs, must be .* no array of"),
        (lambda: jaxlora.nnx.merge(plain), TypeError, "adapted must be .* got Sequential"),
        (lambda: adapt(key, adapted, X, config=CONFIG), ValueError, "'factors/down/kernel/a'"),
        (lambda: Adapted(model, {}), ValueError, "adapters is empty"),
        (lambda: Adapted(model, moved), ValueError, "'up/kern'; nearest: 'up/kernel'"),
        (lambda: Adapted(model, adapters, dropout_rate=1.0), ValueError, "in \\[0, 1\\): got 1.0"),
        (lambda: Adapted(model, adapters, dropout_rate=0.1), ValueError, "needs rngs .* got None"),
        (lambda: adapted(X, method="encod"), TypeError, "of Sequential: got 'encod'"),
        (lambda: adapted(X, method=model.encode), TypeError, "'Sequential.encode' bound"),
    ]:
        with pytest.raises(error, match=message):
            mistake()
    adapted.model.up = nnx.Linear(4, 9, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'up/kernel' is for a weight of shape \\(4, 8\\)"):
        adapted(X)


@pytest.mark.parametrize("rngs", [jax.random.key(3), jax.random.PRNGKey(3)], ids=["new", "old"])
def test_keys_of_both_kinds_draw_the_same(model, rngs):
    adapted = adapt(rngs, model, X, config=CONFIG, dropout_rate=0.5)
    wanted = adapt(jax.random.key(3), model, X, config=CONFIG, dropout_rate=0.5)
    close(adapted.adapters(), wanted.adapters())
    close(adapted(X), wanted(X))


def test_flax_is_imported_with_the_first_use_of_nnx():
    program = """
import sys, jaxlora
assert "flax" not in sys.modules
assert "nnx" in dir(jaxlora)
assert not hasattr(jaxlora, "missing")
assert jaxlora.nnx.adapt.__module__ == "jaxlora.nnx.adapted"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_adapters_of_other_weights_are_refused_unless_asked_for(key):
    x, config = jnp.ones((2, 4)), jaxlora.LoRAConfig(rank=1)
    one, other = (nnx.Linear(4, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    adapters = jaxlora.nnx.adapt(key, one, x, config=config).adapters()
    with pytest.raises(ValueError, match=r"'kernel' are for another base, .* check_base=False"):
        jaxlora.nnx.Adapted(other, adapters)
    adapted = jaxlora.nnx.Adapted(other, adapters, check_base=False)
    np.testing.assert_array_equal(adapted(x), other(x))
