"""What is computed again in the backward pass, where the inputs of products are made again."""

import re

import jax
import jax.numpy as jnp
import pytest
from cases.base import normal
from numpy.testing import assert_allclose

import jaxlora

X = normal(0, 4, 6, 8)
PARAMS = {"gate": normal(1, 8, 12), "up": normal(2, 8, 12), "down": normal(3, 12, 8)}
SHARED, ALONE = (4, 6, 8), (4, 6, 12)  # what goes into the first two of them, and into the last


def block(params, x):
    h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 0.5)
    return x + (jax.nn.silu(h @ params["gate"]) * (h @ params["up"])) @ params["down"]


def again(params, x):
    return jax.checkpoint(block, prevent_cse=False)(params, x)


def loss_of(fn, **config):
    """Return the adapted loss, the same over merged weights, and the factors of both."""
    config = jaxlora.LoRAConfig(rank=2, alpha=3.0, **config)
    params = jaxlora.init(jax.random.key(0), fn, PARAMS, X, config=config)
    base, adapters = jaxlora.split(params)
    adapters = jax.tree.map(lambda factor: factor + 0.2, adapters)

    def loss(run, adapters, x):
        return jnp.sum(jnp.cos(run(jaxlora.bind(base, adapters), x)))

    def low_rank(adapters, x=X):
        return loss(jaxlora.lora(fn, form="factored", strict=True), adapters, x)

    def merged(adapters, x=X):
        return loss(lambda params, x: fn(jaxlora.merge(params), x), adapters, x)

    return low_rank, merged, adapters


def held(fn, platform):
    """Return the shapes of what the gradient's program has barriers for, on a platform."""
    low_rank, _, adapters = loss_of(fn)
    lowered = jax.jit(jax.grad(low_rank)).trace(adapters).lower(lowering_platforms=(platform,))
    found = re.findall(
        r"stablehlo.optimization_barrier .* : tensor<([\dx]+)xf32>", lowered.as_text()
    )
    return [tuple(map(int, shape.split("x"))) for shape in found]


def test_input_of_one_product_that_is_made_again_is_made_once_on_tpu():
    assert held(again, "tpu").count(ALONE) == 1
    assert ALONE not in held(again, "cpu")


def test_input_that_products_share_is_left_to_each():
    assert SHARED not in held(again, "tpu")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_inputs_that_are_kept_have_no_barrier(platform):
    assert ALONE not in held(block, platform)


def per_row(fn):
    return lambda adapters: jax.vmap(jax.grad(fn), (None, 0))(adapters, jnp.stack([X, 2 * X]))


def curvature(fn):
    return lambda adapters: jax.jvp(jax.grad(fn), (adapters,), (adapters,))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("transform", [jax.grad, per_row, curvature])
def test_what_other_platforms_run_has_the_gradients_of_merged_weights(transform, magnitude, as_on):
    as_on("tpu")
    low_rank, merged, adapters = loss_of(again, magnitude=magnitude)
    got, wanted = (jax.jit(transform(fn))(adapters) for fn in (low_rank, merged))
    for one, right in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_allclose(one, right, rtol=1e-4, atol=1e-4)
