"""NNX modules of many kinds, each with an input, for the laws of adapted modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxlora
from jaxlora.nnx import Factor, adapt

CONFIG = jaxlora.LoRAConfig(rank=2, alpha=4)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(1, 5, 4)


def copied(node):
    graphdef, state = nnx.split(node)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))


def pretrained(model):
    """Return a model with its factors, also b, moved away from where they start."""
    factors, seeds = nnx.state(model, Factor), iter(range(99))
    moved = jax.tree.map(lambda x: x + 0.3 * normal(next(seeds), *x.shape), factors)
    nnx.update(model, moved)
    return model


def close(got, wanted, atol=1e-5):
    def check(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)

    jax.tree.map(check, got, wanted)


class Sequential(nnx.Module):
    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.up: Any = nnx.Linear(4, 8, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def encode(self, x):
        return jnp.tanh(self.up(x))

    def __call__(self, x):
        return self.down(self.encode(x))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last: Any = nnx.Linear(8, 3, rngs=rngs)

    def encode(self, x):
        return nnx.relu(self.norm(self.first(x)))

    def __call__(self, x):
        return self.last(self.dropout(self.encode(x)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.zero = nnx.Linear(4, 4, rngs=rngs)
        self.head, self.again = self.embed, self.zero

    def __call__(self, tokens):
        return self.head.attend(self.again(jnp.tanh(self.zero(self.embed(tokens)))))


class Stack(nnx.Module):
    def __init__(self, rngs):
        create = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(create)(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(jnp.tanh(self.linear(x))))


class Ensemble(nnx.Module):
    def __init__(self, rngs):
        create = nnx.vmap(lambda rngs: nnx.Linear(4, 3, rngs=rngs), in_axes=0, out_axes=0)
        self.members = nnx.split_rngs(splits=3)(create)(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


def boxed(rngs):
    init = nnx.with_metadata(nnx.initializers.lecun_normal(), note="boxed")
    return nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), kernel_init=init, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[..., Any]
    x: Any
    targets: Any = "all-linear"

    def adapted(self, key=0):
        config = dataclasses.replace(CONFIG, targets=self.targets)
        model = nnx.jit(self.make)(nnx.Rngs(0))
        return adapt(jax.random.key(key), model, self.x, config=config)


CASES = [
    Case(Tied, jnp.arange(6).reshape(2, 3), targets=("embedding", "kernel")),
    Case(Stack, normal(1, 5, 4)),
    Case(Ensemble, normal(1, 5, 4)),
    Case(boxed, normal(1, 5, 2, 4)),
]
