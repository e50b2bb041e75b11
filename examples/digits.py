"""Adapt a small network to the digit it is worst at, and leave the network itself untouched.

An `nnx.Module` is pretrained on scikit-learn's digits, then adapters alone are trained on its
worst digit among the others. Afterwards the base is bit-identical, and without the adapters the
old accuracy is back. Runs in seconds.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxlora


class Network(nnx.Module):
    """Two hidden layers for images of 8 by 8 pixels."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits ``(batch, 10)`` for images ``(batch, 64)``."""
        return self.last(nnx.relu(self.second(nnx.relu(self.first(images)))))


def fit(loss: Any, trainable: Any, data: Any, steps: int, rate: float, seed: int) -> Any:
    """Minimize ``loss(trainable, images, labels)`` with Adam on random batches."""
    tx = optax.adam(rate)

    @jax.jit
    def step(trainable, state, images, labels):
        grads = jax.grad(loss)(trainable, images, labels)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(len(data[1]), size=64)
        trainable, state = step(trainable, state, data[0][rows], data[1][rows])
    return trainable


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights, the order")
    options = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = np.float32(images / 16)
    split = train_test_split(images, labels, test_size=0.4, random_state=options.seed)
    train_images, test_images, train_labels, test_labels = split

    model = Network(32, nnx.Rngs(options.seed))
    graphdef, state = nnx.split(model)

    def apply(state, images):
        return nnx.merge(graphdef, state)(images)

    def loss(state, images, labels):
        logits = jaxlora.lora(apply)(state, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    predict = jax.jit(lambda state, images: jaxlora.lora(apply)(state, images).argmax(-1))

    def accuracies(state):
        right = np.asarray(predict(state, test_images)) == test_labels
        return np.array([right[test_labels == digit].mean() for digit in range(10)]), right.mean()

    data = (train_images, train_labels)
    pretrained = fit(loss, state, data, steps=150, rate=3e-3, seed=options.seed)
    before, mean_before = accuracies(pretrained)
    worst = int(before.argmin())
    print(f"pretrained: {mean_before:.1%} on all digits, {before[worst]:.1%} on its worst, {worst}")

    # a third of the new data is the worst digit, the rest keeps the others from being forgotten
    rows = np.flatnonzero(train_labels == worst)
    others = np.flatnonzero(train_labels != worst)
    rows = np.concatenate([np.repeat(rows, max(1, len(others) // (2 * len(rows)))), others])
    config = jaxlora.LoRAConfig(rank=options.rank, alpha=2 * options.rank)
    key = jax.random.key(options.seed)
    adapted = jaxlora.init(key, apply, pretrained, test_images, config=config)
    print(jaxlora.summary(adapted))
    base, adapters = jaxlora.split(adapted)

    def adapter_loss(adapters, images, labels):
        return loss(jaxlora.bind(base, adapters), images, labels)

    data = (train_images[rows], train_labels[rows])
    adapters = fit(adapter_loss, adapters, data, steps=300, rate=3e-3, seed=options.seed)
    adapted = jaxlora.bind(base, adapters)
    after, mean_after = accuracies(adapted)
    print(f"adapted: {mean_after:.1%} on all digits, {after[worst]:.1%} on {worst}")

    base_after, _ = jaxlora.split(adapted)
    pairs = zip(jax.tree.leaves(base_after), jax.tree.leaves(pretrained), strict=True)
    identical = all(np.array_equal(x, y) for x, y in pairs)
    _, mean_base = accuracies(base_after)
    print(f"base bit-identical: {identical}; without the adapters: {mean_base:.1%}")
    merged = nnx.merge(graphdef, jaxlora.merge(adapted))
    agree = (jnp.argmax(merged(test_images), -1) == predict(adapted, test_images)).mean()
    print(f"merged into a plain module: same prediction for {agree:.1%}")


if __name__ == "__main__":
    main()
