"""One tree in a `TrainState` with labels or a mask: what trains, and what must not."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora

pytestmark = pytest.mark.once

X = normal(9, 5, 8)
PARAMS = {
    "up": normal(0, 8, 8),
    "down": normal(1, 8, 4),
    "norm": normal(2, 8),
    "other": normal(3, 2),
}
SGD = optax.sgd(0.05, momentum=0.9)


def model(params, x):
    return jnp.tanh(x @ params["up"]) * params["norm"][None] @ params["down"]


def adapted(**options) -> Any:
    config = jaxlora.LoRAConfig(**{"rank": 2, "targets": ("up", "down[:, 0:2]")} | options)
    return jaxlora.init(jax.random.key(0), model, PARAMS, X, config=config)


def after_three_steps(tx, params) -> Any:
    state = TrainState.create(apply_fn=jaxlora.lora(model), params=params, tx=tx)
    gradients = jax.grad(lambda p: jnp.sum(state.apply_fn(p, X) ** 2))
    for _ in range(3):
        grads = gradients(state.params)
        state = state.apply_gradients(grads=grads)
    return state.params


@pytest.mark.parametrize("wrapper", [optax.partition, optax.multi_transform])
@pytest.mark.parametrize("labels", [jaxlora.labels, jaxlora.labels(adapted(train=("norm",)))])
def test_labels_train_the_factors_as_freeze_does_and_keep_the_base(wrapper, labels):
    params = adapted(train=("norm",))
    tx = wrapper({"trained": SGD, "frozen": optax.set_to_zero()}, labels)
    base, got = jaxlora.split(after_three_steps(tx, params))
    jax.tree.map(assert_array_equal, base, PARAMS)
    _, wanted = jaxlora.split(after_three_steps(jaxlora.freeze(SGD), params))
    jax.tree.map(assert_array_equal, got, wanted)
    assert all(factor.any() for factor in jax.tree.leaves(got))


def test_labels_of_adapters_alone_are_all_trained():
    _, adapters = jaxlora.split(adapted(train=("norm",)))
    assert set(jax.tree.leaves(jaxlora.labels(adapters))) == {"trained"}
    tx = optax.partition({"trained": optax.sgd(1.0)}, jaxlora.labels)
    updates, _ = tx.update(adapters, tx.init(adapters), adapters)
    jax.tree.map(lambda x, y: assert_array_equal(x, -y), updates, adapters)


def test_mask_alone_does_what_its_docstring_warns_of():
    params, mask = adapted(), jaxlora.mask(adapted())
    ascent = after_three_steps(optax.masked(SGD, mask), params)
    assert not jnp.array_equal(ascent["norm"], PARAMS["norm"])
    frozen = optax.chain(SGD, optax.transforms.freeze(mask))
    after = after_three_steps(frozen, params)
    assert_array_equal(after["up"].b, params["up"].b)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(12, name="up")(x))
        return nn.Dense(1, name="down")(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x)))


class StateWithStatistics(TrainState):
    batch_stats: Any


def test_train_state_moves_factors_and_statistics_as_with_merged_weights(key):
    model, tx = Network(), optax.sgd(0.1, momentum=0.9)
    variables = model.init(key, X, train=False)
    stats, config = variables["batch_stats"], jaxlora.LoRAConfig(rank=2, targets=("up",))
    adapted = jaxlora.init(key, model.apply, variables, X, train=False, config=config)
    base, adapters = jaxlora.split(adapted["params"])

    def merged_apply(variables, x, **how):
        merged = jaxlora.merge(jaxlora.bind(base, variables["params"]))
        return model.apply({**variables, "params": merged}, x, **how)

    @jax.jit
    def step(state, key):
        def loss(params):
            variables, rngs = {"params": params, "batch_stats": state.batch_stats}, {"dropout": key}
            y, new = state.apply_fn(variables, X, train=True, rngs=rngs, mutable=["batch_stats"])
            return jnp.mean((y - 1.0) ** 2), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    create: Any = functools.partial(StateWithStatistics.create, batch_stats=stats)
    apply = jaxlora.lora(model.apply)
    state = create(apply_fn=apply, params=adapted["params"], tx=jaxlora.freeze(tx))
    wanted = create(apply_fn=merged_apply, params=adapters, tx=tx)
    for i in range(3):
        state, wanted = (step(one, jax.random.key(i)) for one in (state, wanted))
    base_after, adapters_after = jaxlora.split(state.params)
    jax.tree.map(assert_array_equal, base_after, base)
    close = functools.partial(assert_allclose, rtol=1e-4, atol=1e-4)
    got, of_merged = (adapters_after, state.batch_stats), (wanted.params, wanted.batch_stats)
    jax.tree.map(close, got, of_merged)
    assert adapters_after["up/kernel"].b.any()
