"""What cannot be planned is refused, with the cause."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planned_models import OPTIMIZER, shape

import jaxlora
from jaxlora.planning import plan

pytestmark = pytest.mark.once
PARAMS = {"up": shape(64, 256), "down": shape(256, 64)}
X = shape(8, 64)
CONFIG = jaxlora.LoRAConfig(rank=4)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)


def planned(fn=loss, params=PARAMS, *args, **kwargs):
    settings = {"config": CONFIG, "optimizer": OPTIMIZER} | kwargs
    return plan(fn, params, *(args or (X,)), **settings)


def branching(params, x):
    return loss(params, x) if x[0, 0] > 0 else x[0, 0]


class Stateful:
    def init(self, params):
        return float(params["up"].a[0, 0])

    def update(self, grads, state, params):
        return grads, state


MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
OTHER = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
P, Named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
REPLICATED = {"up": None, "down": None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": optax.adam}, "with init and update, .*: got the function 'adam'"),
        ({"optimizer": None}, "optimizer must be an Optax transform .* got None"),
        ({"optimizer": Stateful()}, "state of the optimizer .* abstract: it said: Concretization"),
        (
            {"optimizer": optax.contrib.reduce_on_plateau()},
            "the optimizer must update from gradients, .* it said: ",
        ),
        ({"fn": branching}, "fn cannot be traced from shapes: .* JAX said: TracerBoolConversion"),
        ({"fn": lambda p, x: 3}, "fn must return a loss or floating arrays: got 3"),
        ({"mesh": 8}, "mesh must be a jax.sharding.Mesh: got 8"),
        (
            {"shardings": {"up": None}},
            "shardings must be a tree like params: .* nothing for 'down'",
        ),
        ({"shardings": REPLICATED | {"u": None}}, "it has 'u', which is no leaf; nearest: 'up'"),
        ({"shardings": REPLICATED | {"up": P("data")}}, "without a mesh: pass mesh as well"),
        ({"shardings": REPLICATED | {"up": "data"}}, "got 'data' for 'up'"),
        (
            {"shardings": REPLICATED | {"up": P("x")}, "mesh": MESH},
            "of 'up' does not fit its shape",
        ),
        ({"shardings": REPLICATED | {"up": P(None, None, "data")}, "mesh": MESH}, "does not fit"),
        (
            {"shardings": REPLICATED | {"up": Named(OTHER, P())}, "mesh": MESH},
            r"mesh is on \(data=1\) .* 'up' in shardings on \(model=1\)",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        planned(change.pop("fn", loss), **change)


def test_arrays_of_another_mesh_are_refused():
    x = X.update(sharding=Named(OTHER, P()))
    with pytest.raises(ValueError, match=r"all must be on one mesh: mesh .* '0' in args on"):
        planned(loss, PARAMS, x, mesh=MESH)
    adapted = jaxlora.init(jax.random.key(0), loss, PARAMS, X, config=CONFIG)
    with pytest.raises(ValueError, match="is adapted already: plan needs a plain tree"):
        planned(loss, adapted)


def test_a_step_that_has_no_derivative_leaves_the_others():
    def fn(params, x):
        return loss(params, x) + jnp.sum(jax.lax.linalg.schur(params["other"])[0])

    params = {**PARAMS, "other": shape(4, 4)}
    config = jaxlora.LoRAConfig(rank=4, targets=("up", "down"))
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        found = planned(fn, params, config=config)
    assert found.full is None
    assert "NotImplementedError" in found.missing["full"]
    assert found.trained == 4 * 2 * (64 + 256)
