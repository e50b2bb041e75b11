"""`flax.serialization` of trees with nodes, there and back, whichever module is imported first."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import normal
from flax import serialization
from flax.training.train_state import TrainState
from numpy.testing import assert_array_equal

import jaxlora

pytestmark = pytest.mark.once

X = normal(9, 5, 8)
PLAIN = {"w": normal(0, 8, 12), "stack": normal(1, 3, 12, 12), "scale": normal(2, 12)}


def model(params, x):
    y = x @ params["w"] * params["scale"][None]
    return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, params["stack"])[0]


def made(seed=0, plain=PLAIN, **config) -> Any:
    config = {"rank": 2, "targets": ("w[:, 0:4]", "w[:, 4:8]", "stack")} | config
    config = jaxlora.LoRAConfig(**config)
    params = jaxlora.init(jax.random.key(seed), model, plain, X, config=config)
    return jax.tree.map(lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


def quantized():
    return jaxlora.quantize(model, PLAIN, X, config=jaxlora.Quantization(block_size=4))


def same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert_array_equal(x, y)
        assert x.dtype == y.dtype


TREES = {
    "parts and a stack": made,
    "rows and whole leaves": lambda seed: made(seed, train=("scale",)),
    "magnitudes": lambda seed: made(seed, targets=("w", "stack"), magnitude=True),
    "bfloat16 factors": lambda seed: made(seed, dtype=jnp.bfloat16),
    "quantized": lambda seed: made(seed, quantized()),
    "dropout": lambda seed: jaxlora.dropout(made(seed), jax.random.key(seed), 0.1),
    "adapters": lambda seed: jaxlora.split(made(seed, train=("scale",)))[1],
}


@pytest.mark.parametrize("name", TREES)
def test_bytes_and_state_dicts_come_back(name):
    wanted, target = TREES[name](0), TREES[name](1)
    same(serialization.from_bytes(target, serialization.to_bytes(wanted)), wanted)
    same(serialization.from_state_dict(target, serialization.to_state_dict(wanted)), wanted)


def test_a_training_state_comes_back_and_goes_on():
    params = made()
    tx = jaxlora.freeze(optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=jaxlora.lora(model), params=params, tx=tx)
    ahead = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    back: Any = serialization.from_bytes(state, serialization.to_bytes(ahead))
    same((back.params, back.opt_state), (ahead.params, ahead.opt_state))
    again = [s.apply_gradients(grads=jax.tree.map(jnp.ones_like, params)) for s in (back, ahead)]
    same(again[0].params, again[1].params)


def test_restored_adapters_bind_to_their_base():
    base, adapters = jaxlora.split(made())
    back = serialization.from_bytes(adapters, serialization.to_bytes(adapters))
    same(jaxlora.merge(jaxlora.bind(base, back)), jaxlora.merge(made()))


def test_state_of_another_tree_is_refused():
    _, adapters = jaxlora.split(made())
    state: Any = serialization.to_state_dict(adapters)
    _, other = jaxlora.split(made(rank=3))
    with pytest.raises(
        ValueError, match=r"'a' of the Adapter at .*stack.* shape \(3, 12, 3\): got"
    ):
        serialization.from_state_dict(other, state)
    del state["stack"]["b"]
    with pytest.raises(
        ValueError, match=r"Adapter at .*stack.* must hold \['a', 'b'\]: got \['a'\]"
    ):
        serialization.from_state_dict(adapters, state)


ORDERS = {
    "flax first": "from flax import serialization; import jaxlora",
    "flax last": "import jaxlora; from flax import serialization",
    "nothing of flax": "import jaxlora",
}
LATER = """
import sys
names = [type(finder).__name__ for finder in sys.meta_path]
if "flax" in sys.modules:
    import jax.numpy as jnp
    leaf = jaxlora.TrainedLeaf(jnp.zeros(3), jaxlora.Replacement(jnp.ones(3), (3,)))
    back = serialization.from_bytes(leaf, serialization.to_bytes(leaf))
    assert isinstance(back, jaxlora.TrainedLeaf) and (back.value == 1).all()
    assert "_WhenImported" not in names
    import inspect
    assert "to_state_dict" in inspect.getsource(serialization)
else:
    assert names.count("_WhenImported") == 1
"""


@pytest.mark.parametrize("order", ORDERS)
def test_nodes_are_registered_whichever_is_imported_first(order):
    done = subprocess.run([sys.executable, "-c", ORDERS[order] + LATER], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
