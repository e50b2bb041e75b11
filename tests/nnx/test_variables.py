"""What an adapted module holds: names of sharding, modes, another adapted module's weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import CONFIG, Network, Sequential, X, close, pretrained

import jaxlora
import jaxlora.nnx
from jaxlora.nnx import Adapted, adapt

pytestmark = pytest.mark.once


@pytest.fixture
def model():
    return Sequential()


def by_path(state):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def test_names_of_sharding_stay_on_the_frozen_weights(key):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(4, 3, kernel_init=init, rngs=nnx.Rngs(0))
        adapted = pretrained(adapt(key, model, X, config=CONFIG))
        specs: Any = nnx.get_partition_spec(nnx.state(adapted))
        wanted: Any = nnx.get_partition_spec(nnx.state(model))
        assert specs["model"]["kernel"].get_value() == wanted["kernel"].get_value()
        assert specs["model"]["kernel"].get_value() == jax.sharding.PartitionSpec("data", "model")
        before = adapted(X)
        state = nnx.state(adapted)
        nnx.update(adapted, jax.lax.with_sharding_constraint(state, specs))
        close(adapted(X), before)


def test_modes_are_those_of_the_whole_module(key):
    adapted = pretrained(adapt(key, Network(nnx.Rngs(0)), X, config=CONFIG))
    adapted(X)
    adapted.eval()
    merged = jaxlora.nnx.merge(adapted)
    assert merged.norm.use_running_average
    before = by_path(nnx.state(adapted.model, nnx.BatchStat))
    for _ in range(2):
        close(adapted(X), merged(X))
    jax.tree.map(
        np.testing.assert_array_equal, by_path(nnx.state(adapted.model, nnx.BatchStat)), before
    )
    adapted.train()
    adapted(X)
    after = by_path(nnx.state(adapted.model, nnx.BatchStat))
    assert all((after[path] != before[path]).any() for path in before)


def test_held_module_is_adapted_anew(model, key):
    one = pretrained(adapt(key, model, X, config=CONFIG))
    two = adapt(jax.random.key(7), one.model, X, config=CONFIG)
    close(two(X), model(X))
    same = Adapted(one.model, one.adapters())
    close(same(X), one(X))
    nnx.update(same, jax.tree.map(jnp.zeros_like, nnx.state(same, nnx.Param)))
    assert np.abs(one(X) - same(X)).max() > 1e-3
