"""Where a product is split into heads, its low-rank term is added after the split."""

import functools

import jax
import jax.numpy as jnp
import pytest
from cases.base import normal
from counts import equations
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.tracing.jaxprs import compat, sums

pytestmark = pytest.mark.once

X = normal(0, 2, 5, 8)
PARAMS = {"q": normal(1, 8, 12), "k": normal(2, 8, 12), "bias": normal(3, 12)}


def heads(y):
    return y.reshape(2, 5, 3, 4)


def plain(params, x):
    return jnp.sin(heads(x @ params["q"]))


def biased(params, x):
    return jnp.sin(heads(x @ params["q"] + jnp.broadcast_to(params["bias"], (2, 5, 12))))


def twice(params, x):
    return jnp.sin(heads(x @ params["q"]).reshape(2, 5, 3, 2, 2))


def biased_between(params, x):
    bias = jnp.broadcast_to(params["bias"].reshape(3, 4), (2, 5, 3, 4))
    return jnp.sin((heads(x @ params["q"]) + bias).reshape(2, 5, 3, 2, 2))


def flattened_after(params, x):
    return jnp.sin(heads(x @ params["q"]).reshape(10, 3, 4))


def joined_again(params, x):
    return jnp.sin(heads(x @ params["q"]).reshape(2, 5, 12))


def summed(params, x):
    return jnp.sin(heads(x @ params["q"] + x @ params["k"]))


def weight_first(params, x):
    return jnp.sin(heads(jnp.einsum("df,btd->btf", params["q"], x)))


def read_twice(params, x):
    y = x @ params["q"]
    return jnp.sin(heads(y)) + heads(y)


def added_to_itself(params, x):
    y = x @ params["q"]
    return jnp.sin(heads(y + y))


def leaves(params, x):
    y = x @ params["q"]
    return y, jnp.sin(heads(y))


def flattened(params, x):
    return jnp.sin((x @ params["q"]).reshape(10, 12))


def between(params, x):
    return jnp.sin(heads(2 * (x @ params["q"])))


def read_between(params, x):
    y = heads(x @ params["q"])
    return jnp.sin(y.reshape(2, 5, 3, 2, 2)) + jnp.sum(y)


ONCE, AGAIN = (2, 5, 3, 4), (2, 5, 3, 2, 2)
LATE = {  # how many terms are added late, and in which shape
    plain: (1, ONCE),
    biased: (1, ONCE),
    twice: (1, AGAIN),
    biased_between: (1, AGAIN),
    flattened_after: (1, ONCE),
    joined_again: (1, ONCE),
    read_between: (1, ONCE),
    summed: (2, ONCE),
    weight_first: (1, ONCE),
}
AT_ONCE = (read_twice, added_to_itself, leaves, flattened, between)
TRANSFORMS = {
    "as it is": lambda fn: fn,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda fn: lambda params, x: jax.vmap(fn, (None, 0))(params, jnp.stack([x, 2 * x])),
    "scan": lambda fn: (
        lambda params, x: jax.lax.scan(lambda _, x: (0.0, fn(params, x)), 0.0, x[None])[1]
    ),
}


def adapted(fn, rank=2, magnitude=False):
    targets = ("q", "k") if fn is summed else ("q",)
    config = jaxlora.LoRAConfig(rank=rank, alpha=4, targets=targets, magnitude=magnitude)
    params = jaxlora.init(jax.random.key(0), fn, PARAMS, X, config=config)
    base, adapters = jaxlora.split(params)
    return base, jax.tree.map(lambda factor: factor + 0.3, adapters)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("fn", [*LATE, *AT_ONCE])
def test_results_and_gradients_are_those_of_merged_weights(fn, transform, magnitude):
    base, adapters = adapted(fn, magnitude=magnitude)
    apply = TRANSFORMS[transform](fn)

    def loss(run, adapters):
        outs = run(jaxlora.bind(base, adapters), X)
        return sum(jnp.sum(jnp.cos(out)) for out in jax.tree.leaves(outs))

    low_rank = functools.partial(loss, jaxlora.lora(apply, form="factored"))
    merged = functools.partial(loss, lambda params, x: apply(jaxlora.merge(params), x))
    for got, wanted in zip(
        jax.tree.leaves(jax.value_and_grad(low_rank)(adapters)),
        jax.tree.leaves(jax.value_and_grad(merged)(adapters)),
        strict=True,
    ):
        assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("fn", [*LATE, *AT_ONCE])
def test_split_of_a_product_with_one_reader_is_found(fn):
    program = compat.opened(jax.make_jaxpr(fn)(PARAMS, X))
    found = [split.reshape.outvars[0] for split in sums.splits(program).values()]
    count, shape = LATE.get(fn, (0, ()))
    assert [compat.shape(var) for var in found] == [shape] * count


# A gain scales the product with its term, and nothing else.
DIRECT = (plain, twice, flattened_after, weight_first)


@pytest.mark.parametrize(
    ("fn", "magnitude"), [*((fn, False) for fn in LATE), *((fn, True) for fn in DIRECT)]
)
def test_term_is_added_in_heads(fn, magnitude):
    base, adapters = adapted(fn, magnitude=magnitude)
    run = jaxlora.lora(fn, form="factored")
    program = jax.make_jaxpr(lambda adapters: run(jaxlora.bind(base, adapters), X))(adapters)
    count, shape = LATE[fn]
    assert sums_of(program, shape) - sums_of(jax.make_jaxpr(fn)(PARAMS, X), shape) == count


def sums_of(program, shape):
    """Return how many sums of a program have a shape."""
    return sum(compat.shape(eqn.outvars[0]) == shape for eqn in equations(program, "add"))
