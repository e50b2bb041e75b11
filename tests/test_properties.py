"""Random programs: low-rank equals merged, in value and gradient, and nothing is made dense.

Each version of Python tries examples of its own, 260 of them. ``PROPERTY_EXAMPLES`` is how many
times as many are tried: 0.5 on the older version in a short run of CI, and 20 in the long run.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
from hypothesis import HealthCheck, assume, given, seed, settings

import jaxlora

TIMES = float(os.environ.get("PROPERTY_EXAMPLES", "1"))


def examples(count):
    return settings(
        max_examples=round(count * TIMES),
        deadline=None,
        database=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.function_scoped_fixture,
        ],
    )


def loss(fn, *args):
    outs = jax.tree.leaves(fn(*args))
    return sum(
        jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y.astype("float32")) for y in outs
    )


def assert_law(program):
    """Check that the adapted program equals the program of merged weights."""
    shapes = {"w": jax.ShapeDtypeStruct(program.shape, program.dtype)}
    x = jax.ShapeDtypeStruct(program.x_shape, program.dtype)
    # a weight that is summed along new axes alone, or not at all, is no site
    assume("w" in jaxlora.find_sites(program.fn, shapes, x))
    config = jaxlora.LoRAConfig(rank=1, alpha=0.5, targets=("w",))
    init = functools.partial(jaxlora.init, jax.random.key(0), program.fn, config=config)
    params = jax.eval_shape(init, shapes, x)
    fn = jaxlora.lora(program.fn, strict=True, form=program.form)

    @jax.jit
    def both(params, x):
        base, adapters = jaxlora.split(params)

        def merged(adapters):
            return jaxlora.merge(jaxlora.bind(base, adapters))

        low = jax.grad(lambda a, x: loss(fn, jaxlora.bind(base, a), x), (0, 1))(adapters, x)
        dense = jax.grad(lambda a, x: loss(program.fn, merged(a), x), (0, 1))(adapters, x)
        return (fn(params, x), low), (program.fn(merged(adapters), x), dense)

    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda s: np.asarray(draw(size=s.shape), s.dtype), params)
    # so small that sums, and their sines, are small
    x = np.asarray(draw(size=x.shape) / np.sqrt(x.size), x.dtype)
    epsilon, largest = (float(getattr(jnp.finfo(program.dtype), name)) for name in ("eps", "max"))

    def moved():
        return jax.tree.map(
            lambda p: (p * (1 + epsilon * draw(size=p.shape))).astype(p.dtype), params
        )

    with jax.numpy_dtype_promotion("standard"):
        got, wanted = both(params, x)
        # how far the roundings of the weights alone move the result; one try may move it by chance
        # the least
        nearby = [both(moved(), x)[1] for _ in range(8)]
    for y, z, *near in zip(*map(jax.tree.leaves, (got, wanted, *nearby)), strict=True):
        assert (y.shape, y.dtype) == (z.shape, z.dtype)
        y, z, near = (np.asarray(array, np.float64) for array in (y, z, near))
        # near the end of float16 it is chance which of the two programs overflows
        assume(max(np.abs(z).max(initial=0), np.abs(near).max(initial=0)) < largest / 10)
        size, moves = np.abs(z).max(initial=0), np.abs(z - near).max(initial=0)
        atol = 100 * epsilon * (size + 1) + 10 * moves
        np.testing.assert_allclose(y, z, rtol=0, atol=atol)


@examples(150)
@seed(sys.version_info.minor)
@given(programs.programs())
def test_contracted_weight(program):
    assert_law(program)


@examples(60)
@seed(sys.version_info.minor)
@given(programs.lookups())
def test_looked_up_weight(program):
    assert_law(program)


@examples(50)
@seed(sys.version_info.minor)
@given(programs.convolutions())
def test_convolved_weight(program):
    assert_law(program)
