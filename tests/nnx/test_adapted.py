"""A module with adapters is a module: NNX itself calls, trains and stores it."""

import concurrent.futures
import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import errors, nnx
from modules import (
    CASES,
    CONFIG,
    Case,
    Network,
    Sequential,
    Stack,
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


@pytest.mark.parametrize(
    "method",
    ["encode", Sequential.encode, lambda model, x: model.encode(x)],
    ids=["name", "method", "function"],
)
def test_another_method_runs_with_the_adapters(model, key, method):
    adapted = pretrained(adapt(key, model, X, config=CONFIG))
    close(adapted(X, method=method), jaxlora.nnx.merge(adapted).encode(X))
    with pytest.warns(jaxlora.SkippedWeightWarning, match="down/kernel .* does not use it"):
        assert list(adapt(key, model, X, config=CONFIG, method=method).factors) == ["up/kernel"]


def test_streams_passed_as_arguments_move_on(key):
    class Noisy(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, flag, *, rngs):
            return self.dropout(self.linear(x), rngs=rngs) if flag else None

    model, rngs, same = Noisy(), nnx.Rngs(1), nnx.Rngs(1)
    adapted = adapt(key, model, X, True, rngs=rngs, config=CONFIG)
    assert rngs.default.count[...] == 0
    for count in (1, 2):
        close(adapted(X, True, rngs=rngs), model(X, True, rngs=same))
        assert rngs.default.count[...] == count
    assert adapted(X, False, rngs=rngs) is None


def test_cache_and_intermediates_are_kept(key):
    model = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    model.init_cache((2, 5, 4))
    plain = copied(model)
    adapted = adapt(key, model, normal(0, 2, 1, 4), config=CONFIG)
    call = nnx.jit(lambda model, x: model(x, sow_weights=True))
    for i in range(3):
        x = normal(i, 2, 1, 4)
        out, seen = nnx.capture(call, nnx.Intermediate)(adapted, x)
        wanted, wanted_seen = nnx.capture(call, nnx.Intermediate)(plain, x)
        close(out, wanted)
        close(seen["model"], wanted_seen)
    close(nnx.state(adapted.model, nnx.Cache), nnx.state(plain, nnx.Cache))
    assert nnx.state(adapted.model, nnx.Cache)["cache_index"][...] == 3


def test_dropout_is_for_training_alone(model, key):
    adapted = pretrained(adapt(key, model, X, config=CONFIG, dropout_rate=0.5))
    one, two = adapted(X), adapted(X)
    assert np.abs(one - two).max() > 1e-3
    adapted.eval()
    close(adapted(X), Adapted(model, adapted.adapters())(X))
    adapted.train()
    graphdef, _ = nnx.split(model)
    params = jaxlora.dropout(adapted.params(), copied(adapted.rngs)(), 0.5)
    wanted = jaxlora.lora(lambda state: nnx.merge(graphdef, state)(X))(params)
    close(adapted(X), wanted)


def test_adapted_stands_inside_a_larger_module(key):
    outer = Sequential()
    inner = outer.up = adapt(key, outer.up, X, config=CONFIG)
    pretrained(outer)
    grads = nnx.grad(lambda model: jnp.sum(model(X) ** 2), argnums=OF_FACTORS)(outer)
    paths = [path for path, _ in nnx.to_flat_state(grads)]
    assert paths == [("up", "factors", "kernel", factor) for factor in "ab"]
    wanted = outer.down(jnp.tanh(jaxlora.nnx.merge(inner)(X)))
    close(outer(X), wanted)
    with pytest.raises(ValueError, match="adapted already, it holds the factor 'up/factors/kernel"):
        adapt(key, outer, X, config=CONFIG)


def test_many_adapters_of_one_module_run_at_once(model, key):
    adapted = pretrained(adapt(key, model, X, config=CONFIG))
    one = nnx.state(adapted, Factor)
    wanted = []
    for scale in (1, 2, -1):
        other = copied(adapted)
        nnx.update(other, jax.tree.map(lambda x, scale=scale: scale * x, one))
        wanted.append(jaxlora.nnx.merge(other)(X))
    nnx.update(adapted, jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), one))
    axes = nnx.StateAxes({Factor: 0, ...: None})
    out = nnx.vmap(lambda model, x: model(x), in_axes=(axes, None))(adapted, X)
    close(out, jnp.stack(wanted))


def test_closed_over_a_module_that_changes_is_refused(model, key):
    adapted = adapt(key, model, X, config=CONFIG)
    close(jax.jit(lambda x: adapted(x))(X), model(X))
    changing = adapt(key, Network(nnx.Rngs(0)), X, config=CONFIG)
    with pytest.raises(errors.TraceContextError):
        jax.jit(lambda x: changing(x))(X)


def test_writes_to_weights_hold_for_one_call(key):
    class Doubled(nnx.Module):
        def __init__(self):
            self.param = nnx.Param(normal(0, 4, 4))
            self.other = nnx.data(normal(1, 4, 3))
            self.calls = nnx.data(jnp.array(0))

        def __call__(self, x):
            self.param[...] = 2 * self.param[...]
            self.other = 2 * self.other
            self.calls = self.calls + 1
            return x @ self.param[...] @ self.other

    adapted = pretrained(adapt(key, Doubled(), X, config=CONFIG))
    model = adapted.model
    plain = jaxlora.merge(adapted.params())
    for _ in range(2):
        close(adapted(X), 4 * X @ plain["param"][...] @ plain["other"])
    np.testing.assert_array_equal(model.param[...], normal(0, 4, 4))
    np.testing.assert_array_equal(model.other, normal(1, 4, 3))
    assert model.calls == 2


def test_variables_made_in_a_call_are_kept(key):
    class Watched(Sequential):
        def __call__(self, x):
            self.seen = nnx.Intermediate(self.encode(x))
            return self.down(self.seen[...])

    plain = Watched()
    adapted = adapt(key, Watched(), X, config=CONFIG)
    for x in (X, 2 * X):
        close(nnx.jit(lambda model, x: model(x))(adapted, x), plain(x))
        close(nnx.state(jaxlora.nnx.merge(adapted)), nnx.state(plain))


@pytest.mark.parametrize("made", [lambda calls: calls + 1, lambda calls: nnx.Dict(x=nnx.Param(X))])
def test_change_that_would_be_lost_is_refused(key, made):
    class Counting(Sequential):
        calls: Any = 0

        def __call__(self, x):
            self.calls = made(self.calls)
            return super().__call__(x)

    adapted = adapt(key, Counting(), X, config=CONFIG)
    with pytest.raises(ValueError, match="changes attributes of Counting that are no arrays"):
        adapted(X)


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


def jitted(run):
    """Return a function under `jax.jit`; `nnx.jit` writes to its arguments, which threads share."""

    def call(model, x):
        graphdef, state = nnx.split(model)
        return jax.jit(lambda state, x: run(nnx.merge(graphdef, state), x))(state, x)

    return call


@pytest.mark.parametrize("compile", [lambda run: run, jitted], ids=["eager", "jit"])
@pytest.mark.parametrize("make", [Network, Stack])
def test_threads_call_one_module_at_once(make, compile):
    case = Case(make, X)
    models = [pretrained(case.adapted(key=seed)) for seed in range(3)]
    for model in models:
        model.eval()
    wanted = [jaxlora.nnx.merge(model)(X) for model in models]
    start = threading.Barrier(6)

    def call(first):
        start.wait()
        outs = []
        for i in range(first, first + 3):
            run = compile(lambda model, x: model(x))
            outs.append((i % 3, np.asarray(run(models[i % 3], X))))
        return outs

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        for outs in threads.map(call, range(6)):
            for i, out in outs:
                close(out, wanted[i])


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
