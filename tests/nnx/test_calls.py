"""What a call of an adapted module does beside its output: streams, caches, writes, threads."""

import concurrent.futures
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from modules import (
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
from jaxlora.nnx import Adapted, Factor, adapt

OF_FACTORS = nnx.DiffState(0, Factor)


@pytest.fixture
def model():
    return Sequential()


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
