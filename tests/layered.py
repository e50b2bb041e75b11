"""Models of layers that are written out one after the other, and what is compared of them."""

import re

import jax
import jax.numpy as jnp
from cases.base import normal
from counts import equations, repeated
from numpy.testing import assert_allclose

import jaxlora

X = normal(0, 4, 6, 8)
LAYERS = 5


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.5)


def attention(x, w):
    h = norm(x)
    q, k, v = (jnp.reshape(h @ w[name], (4, 6, 2, 4)) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ w["o"]


def gated(x, w):
    h = norm(x)
    return x + (jax.nn.silu(h @ w["q"]) * (h @ w["k"])) @ w["o"]


def masked(x, w):
    return jnp.where(jnp.abs(x) < 2, x + jnp.tanh(norm(x) @ w["v"]) @ w["o"], x)


def transposed(x, w):
    return x + jnp.tanh(norm(x) @ (w["q"].T + w["k"])) @ w["o"].reshape(8, 2, 4).reshape(8, 8)


BLOCKS = {attention: "qkvo", gated: "qko", masked: "vo", transposed: "qko"}  # and their weights


def of(block, named=True):
    """Return a model of layers; of a block that returns two values the second are summed."""

    def fn(params, x):
        told = []
        for i in range(LAYERS):
            with jax.named_scope(f"layer{i}" if named else "layers"):
                found = block(x, params[f"layer{i}"])
            x, *rest = found if isinstance(found, tuple) else (found,)
            told += rest
        return jnp.cos(x) + sum(told)

    return fn


def adapted(fn, *args, names="qkvo", layers=tuple(range(LAYERS)), quantization=None, **config):
    params = {
        f"layer{i}": {name: normal(i, 8, 8) * 0.3 for i, name in enumerate(names, 4 * i)}
        for i in range(LAYERS)
    }
    targets = tuple(f"layer{i}/{name}" for i in layers for name in names)
    if quantization is not None:
        params = jaxlora.quantize(fn, params, *args, config=quantization)
    return moved(fn, params, *args, config=jaxlora.LoRAConfig(rank=2, targets=targets, **config))


def moved(fn, params, *args, config):
    """Return params with adapters that were trained."""
    tree = jaxlora.init(jax.random.key(0), fn, params, *args, config=config)
    base, adapters = jaxlora.split(tree)
    leaves, treedef = jax.tree.flatten(adapters)
    leaves = [x + 0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)]
    return jaxlora.bind(base, jax.tree.unflatten(treedef, leaves))


def calls(fn, *args):
    """Return the functions of whole layers in a program of fn, one for each call."""
    return [p for p in repeated(jax.make_jaxpr(fn)(*args)) if [*equations(p, "dot_general")]]


def gradients(fn, tree, *args, made=lambda tree: tree):
    """Return value and gradients of the factors and all arguments of a function of trees."""
    base, adapters = jaxlora.split(tree)

    def loss(adapters, *args):
        return jnp.sum(fn(made(jaxlora.bind(base, adapters)), *args) ** 2)

    which = tuple(range(len(args) + 1))
    return jax.jit(jax.value_and_grad(loss, argnums=which))(adapters, *args)


def names_told(warnings):
    """Return the names of the weights that were warned of."""
    return {*re.findall(r"'(\S+)' reaches", " ".join(str(told.message) for told in warnings))}


def assert_like_merged(fn, tree, *args, strict=True):
    ours = gradients(jaxlora.lora(fn, strict=strict), tree, *args)
    theirs = gradients(fn, tree, *args, made=jaxlora.merge)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-3, atol=1e-3), ours, theirs)
