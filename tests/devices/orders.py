"""Two orders of the devices of one mesh: training is the same, to the rounding of its sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import jaxlora

ORDERS = (range(8), (5, 2, 7, 0, 3, 6, 1, 4))
SPECS = {"up": P("data", "model"), "down": P("model", "data")}
STEPS = 100


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def losses(order, initializer):
    """Return the loss of each step of a training on eight devices in an order."""
    devices = np.array(jax.devices())[list(order)].reshape(4, 2)
    mesh = Mesh(devices, ("data", "model"))
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (16, 64)) / 4,
        "down": jax.random.normal(keys[1], (64, 16)) / 8,
    }
    params = {
        name: jax.device_put(w, NamedSharding(mesh, SPECS[name])) for name, w in params.items()
    }
    x = jax.device_put(jax.random.normal(keys[2], (64, 16)), NamedSharding(mesh, P("data")))
    config = jaxlora.LoRAConfig(rank=4, alpha=8, initializer=initializer)
    base, adapters = jaxlora.split(jaxlora.init(keys[0], model, params, x, config=config))
    tx = optax.adam(1e-2)
    state, found = tx.init(adapters), []

    @jax.jit
    def step(adapters, state, base):
        def loss(adapters):
            y = jaxlora.lora(model)(jaxlora.bind(base, adapters), x)
            return jnp.square(y - jnp.sin(3 * x)).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(STEPS):
            adapters, state, value = step(adapters, state, base)
            found.append(float(value))
    return found


@pytest.mark.parametrize("initializer", ["uniform", "zero_a"])
def test_orders_of_devices_train_alike(initializer):
    first, second = (losses(order, initializer) for order in ORDERS)
    assert first[-1] < 0.8 * first[0]
    assert_allclose(first, second, rtol=1e-4)
    print(initializer, np.max(np.abs(np.divide(first, second) - 1)))
