"""Random programs: low-rank equals merged, in value and gradient, and nothing is made dense.

``PROPERTY_EXAMPLES`` is how many times as many examples are tried; 10 is the long run.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from cases import normal
from cases.base import trained
from hypothesis import HealthCheck, assume, given, settings

import jaxlora

TIMES = int(os.environ.get("PROPERTY_EXAMPLES", "1"))


def examples(count):
    return settings(
        max_examples=count * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """Compile with few optimizations, for every program runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def loss(fn, *args):
    outs = jax.tree.leaves(fn(*args))
    return sum(
        jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y.astype("float32")) for y in outs
    )


def assert_law(program):
    """Check that the adapted program equals the program of merged weights."""
    params = {"w": normal(1, *program.shape, dtype=program.dtype)}
    x = normal(2, *program.x_shape, dtype=program.dtype)
    # a weight that is summed along new axes alone, or not at all, is no site
    assume("w" in jaxlora.find_sites(program.fn, params, x))
    config = jaxlora.LoRAConfig(rank=1, alpha=0.5, targets=("w",))
    key = jax.random.key(0)
    base, adapters = jaxlora.split(jaxlora.init(key, program.fn, params, x, config=config))
    adapters = trained(key, adapters)
    fn = jaxlora.lora(program.fn, strict=True)
    bound, merged = (
        (lambda a: jaxlora.bind(base, a)),
        (lambda a: jaxlora.merge(jaxlora.bind(base, a))),
    )

    @jax.jit
    def both(adapters, x):
        low = jax.grad(lambda a, x: loss(fn, bound(a), x), (0, 1))(adapters, x)
        dense = jax.grad(lambda a, x: loss(program.fn, merged(a), x), (0, 1))(adapters, x)
        return (fn(bound(adapters), x), low), (program.fn(merged(adapters), x), dense)

    with jax.numpy_dtype_promotion("standard"):
        got, wanted = both(adapters, x)
    epsilon = float(jnp.finfo(program.dtype).eps)
    for y, z in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (y.shape, y.dtype) == (z.shape, z.dtype)
        y, z = np.asarray(y, np.float64), np.asarray(z, np.float64)
        np.testing.assert_allclose(
            y, z, rtol=0, atol=100 * epsilon * (np.abs(z).max(initial=0) + 1)
        )


@examples(300)
@given(programs.programs())
def test_contracted_weight(program):
    assert_law(program)


@examples(120)
@given(programs.lookups())
def test_looked_up_weight(program):
    assert_law(program)


@examples(100)
@given(programs.convolutions())
def test_convolved_weight(program):
    assert_law(program)
