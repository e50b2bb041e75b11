"""The two ways to train adapters of a Linen model, on the same batches, with the same result.

1. Gradients of the adapters alone: `jax.grad` over what `jaxlora.split` returns.
2. One tree in a `flax.training.train_state.TrainState`, with an optimizer from `jaxlora.freeze`.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import jaxlora


class Network(nn.Module):
    """A network with one hidden layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(batch, 1)`` for ``(batch, 8)``."""
        return nn.Dense(1, name="down")(nn.tanh(nn.Dense(32, name="up")(x)))


def main() -> None:
    """Train in both ways."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of each way, default 200")
    options = parser.parse_args()

    model = Network()
    x = jax.random.normal(jax.random.key(1), (256, 8))
    y = jnp.sin(x.sum(-1, keepdims=True))
    params = model.init(jax.random.key(0), x)
    config = jaxlora.LoRAConfig(rank=4, alpha=8, targets=("up",))
    params = jaxlora.init(jax.random.key(2), model.apply, params, x, config=config)
    apply = jaxlora.lora(model.apply)

    def loss(params):
        return jnp.mean((apply(params, x) - y) ** 2)

    tx = optax.adamw(1e-2)

    # 1. gradients of the adapters alone
    base, adapters = jaxlora.split(params)

    @jax.jit
    def step(adapters, opt_state):
        grads = jax.grad(lambda adapters: loss(jaxlora.bind(base, adapters)))(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    opt_state = tx.init(adapters)
    for _ in range(options.steps):
        adapters, opt_state = step(adapters, opt_state)
    first = jaxlora.bind(base, adapters)

    # 2. one tree in a train state
    @jax.jit
    def train_step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = TrainState.create(apply_fn=apply, params=params, tx=jaxlora.freeze(tx))
    for _ in range(options.steps):
        state = train_step(state)

    gap = max(
        float(jnp.abs(one - two).max())
        for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(state.params), strict=True)
    )
    print(
        f"loss before {loss(params):.4f}, way 1 {loss(first):.4f}, way 2 {loss(state.params):.4f}"
    )
    print(f"largest difference between the two: {gap:.1e}")


if __name__ == "__main__":
    main()
