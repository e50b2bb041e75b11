"""Adapt a small network to the digit it is worst at, and leave the network itself untouched.

An `nnx.Module` is pretrained on scikit-learn's digits, then adapters alone are trained on its
worst digit among the others. Afterwards the base is bit-identical, and without the adapters the
old accuracy is back. Runs in seconds.
"""

import argparse
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxlora.nnx


class Network(nnx.Module):
    """Two hidden layers for images of 8 by 8 pixels."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits ``(batch, 10)`` for images ``(batch, 64)``."""
        return self.last(nnx.relu(self.second(nnx.relu(self.first(images)))))


def fit(model: nnx.Module, wrt: Any, data: Any, steps: int, rate: float, seed: int) -> None:
    """Train the variables of type ``wrt`` with Adam on random batches."""
    optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss(model):
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)

    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(len(data[1]), size=64)
        step(model, optimizer, data[0][rows], data[1][rows])


@nnx.jit
def predict(model: Any, images: jax.Array) -> jax.Array:
    """Return the likeliest digit of each image."""
    return model(images).argmax(-1)


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

    def accuracies(model):
        right = np.asarray(predict(model, test_images)) == test_labels
        return np.array([right[test_labels == digit].mean() for digit in range(10)]), right.mean()

    model = Network(32, nnx.Rngs(options.seed))
    data = (train_images, train_labels)
    fit(model, nnx.Param, data, steps=150, rate=3e-3, seed=options.seed)
    before, mean_before = accuracies(model)
    worst = int(before.argmin())
    print(f"pretrained: {mean_before:.1%} on all digits, {before[worst]:.1%} on its worst, {worst}")

    # a third of the new data is the worst digit, the rest keeps the others from being forgotten
    rows = np.flatnonzero(train_labels == worst)
    others = np.flatnonzero(train_labels != worst)
    rows = np.concatenate([np.repeat(rows, max(1, len(others) // (2 * len(rows)))), others])
    config = jaxlora.LoRAConfig(rank=options.rank, alpha=2 * options.rank)
    pretrained = jax.tree.map(np.asarray, nnx.state(model))
    adapted = jaxlora.nnx.adapt(jax.random.key(options.seed), model, test_images, config=config)
    print(jaxlora.summary(adapted.params()))

    data = (train_images[rows], train_labels[rows])
    fit(adapted, jaxlora.nnx.Factor, data, steps=300, rate=3e-3, seed=options.seed)
    after, mean_after = accuracies(adapted)
    print(f"adapted: {mean_after:.1%} on all digits, {after[worst]:.1%} on {worst}")

    pairs = zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(pretrained), strict=True)
    identical = all(np.array_equal(x, y) for x, y in pairs)
    _, mean_base = accuracies(model)
    print(f"base bit-identical: {identical}; without the adapters: {mean_base:.1%}")
    merged = jaxlora.nnx.merge(adapted)
    agree = (predict(merged, test_images) == predict(adapted, test_images)).mean()
    print(f"merged into a plain module: same prediction for {agree:.1%}")


if __name__ == "__main__":
    main()
