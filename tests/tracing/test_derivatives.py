"""Programs whose values do not tell their derivatives: selections, complex inputs, loops."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import normal
from cases.base import trained
from jax import lax
from numpy.testing import assert_allclose

import jaxlora

W, X = normal(0, 8, 8), normal(1, 4, 8)
MASK = jax.random.bernoulli(jax.random.key(2), 0.5, (8, 8))
FORMS = ("factored", "weight-side")


def adapted(shape=(8, 8)):
    """Return a base and trained adapters for a weight, a stack if it has three axes."""
    spec = "bi,io->bo" if len(shape) == 2 else "bi,sio->sbo"
    weights = {"w": normal(0, *shape)}
    params = jaxlora.init(
        jax.random.key(0),
        lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"]) if spec[3] == "s" else x @ p["w"],
        weights,
        X,
        config=jaxlora.LoRAConfig(rank=2, targets=("w",)),
    )
    base, adapters = jaxlora.split(params)
    return base, trained(jax.random.key(1), adapters)


def assert_equal_to_merged(fn, form: Any = "auto", shape=(8, 8), *, derive=jax.grad):
    """Check that a program of adapted weights and its derivative equal those of merged ones."""
    base, adapters = adapted(shape)

    def low(adapters):
        return jnp.sum(jaxlora.lora(fn, form=form)(jaxlora.bind(base, adapters), X) ** 2)

    def dense(adapters):
        return jnp.sum(fn(jaxlora.merge(jaxlora.bind(base, adapters)), X) ** 2)

    for way in (lambda f: f, derive):
        got, wanted = (jax.jit(way(f))(adapters) for f in (low, dense))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert_allclose(x, y, rtol=1e-4, atol=1e-4 * (1 + float(jnp.abs(y).max())))


def stopped(params):
    return lax.stop_gradient(params["w"])


def by_example(branch, other):
    """Return a program that chooses a weight for each example."""
    return lambda p, x: jax.vmap(
        lambda x: x @ lax.cond(x[0] > 0, lambda: branch(p), lambda: other(p))
    )(x)


def entries(which):
    """Return a program of a stack of which some entries get no gradient."""
    return lambda p, x: jnp.einsum(
        "bi,sio->sbo", x, lax.select(jnp.broadcast_to(which, p["w"].shape), p["w"], stopped(p))
    )


CHOICES = {
    "mask": lambda p, x: x @ lax.select(MASK, p["w"], stopped(p)),
    "mask of rows": lambda p, x: (
        x @ lax.select(jnp.broadcast_to(MASK[:, :1], (8, 8)), p["w"], stopped(p))
    ),
    "where": lambda p, x: x @ jnp.where(MASK, p["w"], stopped(p)),
    "product of the two": lambda p, x: (
        x @ lax.select(MASK, p["w"] * stopped(p), stopped(p) * p["w"])
    ),
    "selected twice": lambda p, x: (
        x @ lax.select(MASK, lax.select(MASK.T, p["w"], stopped(p)), p["w"])
    ),
    "where, the other stopped": lambda p, x: jnp.where(MASK[:4], x @ p["w"], x @ stopped(p)),
}
LOW_RANK_CHOICES = {
    "scalar": lambda p, x: x @ lax.select(x[0, 0] > 9, p["w"], stopped(p)),
    "scalar, of two scales": lambda p, x: x @ lax.select(x[0, 0] > 9, p["w"], 2 * p["w"]),
    "one and the same": lambda p, x: x @ lax.select(MASK, p["w"], p["w"]),
    "stopped and stopped": lambda p, x: x @ lax.select(MASK, stopped(p), stopped(p)),
    "cond by example": by_example(lambda p: p["w"], stopped),
    "cond by example, both": by_example(lambda p: p["w"], lambda p: p["w"]),
    "product in a cond": lambda p, x: jax.vmap(
        lambda x: lax.cond(x[0] > 0, lambda w, x: x @ w, lambda w, x: -x @ w, p["w"], x)
    )(x),
}


@pytest.mark.filterwarnings("ignore::jaxlora.MaterializationWarning")
@pytest.mark.parametrize("name", CHOICES)
def test_choice_between_a_weight_and_what_has_another_derivative(name):
    assert_equal_to_merged(CHOICES[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOW_RANK_CHOICES)
def test_choice_by_one_predicate_for_a_weight_is_low_rank(name, form):
    assert_equal_to_merged(LOW_RANK_CHOICES[name], form)


def test_choice_by_entries_of_a_stack_is_low_rank():
    which = jnp.array([True, False, True])[:, None, None]
    assert_equal_to_merged(
        lambda p, x: lax.scan(
            lambda c, w: (c, x @ w),
            0,
            lax.select(jnp.broadcast_to(which, p["w"].shape), p["w"], stopped(p)),
        )[1],
        shape=(3, 8, 8),
    )


def complex_of(x):
    return x + 1j * x[::-1]


COMPLEX = {
    "matmul": lambda p, x: jnp.imag(complex_of(x) @ p["w"]),
    "weight first": lambda p, x: jnp.imag(p["w"] @ complex_of(x).T),
    "einsum": lambda p, x: jnp.imag(jnp.einsum("bi,ij->bj", complex_of(x), p["w"])),
    "fft": lambda p, x: jnp.abs(jnp.fft.fft(x) @ p["w"]),
    "real part alone": lambda p, x: jnp.real(complex_of(x) @ p["w"]),
    "remat": lambda p, x: jnp.imag(
        jax.checkpoint(lambda w: jnp.tanh(complex_of(x) @ w) @ w)(p["w"])
    ),
    "shared input": lambda p, x: (lambda c: jnp.imag(c @ p["w"]) * jnp.real(c @ p["w"].T))(
        complex_of(x)
    ),
    "scan": lambda p, x: jnp.abs(
        lax.scan(lambda c, _: (c @ p["w"], None), complex_of(x), length=2)[0]
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_input_keeps_both_its_parts(name, form):
    with jax.numpy_dtype_promotion("standard"):
        assert_equal_to_merged(COMPLEX[name], form)


@pytest.mark.filterwarnings("ignore::jaxlora.MaterializationWarning")
def test_weight_made_complex_keeps_its_value():
    with jax.numpy_dtype_promotion("standard"):
        assert_equal_to_merged(lambda p, x: jnp.imag(complex_of(x) @ (p["w"] + 1j * p["w"].T)))


def smaller(p, c):
    return 0.5 * c * jnp.cos(c @ p["w"])  # ends, whatever the weight is


LOOPS = {
    "predicate of the carry": lambda p, x: jax.vmap(
        lambda v: lax.while_loop(lambda c: jnp.abs(c).max() > 0.1, lambda c: smaller(p, c), v)
    )(x),
    "weight in the predicate": lambda p, x: jax.vmap(
        lambda v: lax.while_loop(lambda c: jnp.abs(c @ p["w"]).max() > 0.1, lambda c: 0.5 * c, v)
    )(x),
    "bound by example": lambda p, x: jax.vmap(
        lambda v, n: lax.fori_loop(0, n, lambda i, c: smaller(p, c), v)
    )(x, jnp.array([1, 2, 3, 0])),
    "weight carried": lambda p, x: jax.vmap(
        lambda v, n: lax.while_loop(
            lambda c: c[0] < n,
            lambda c: (c[0] + 1, c[1], smaller({"w": c[1]}, c[2])),
            (0, p["w"], v),
        )[2]
    )(x, jnp.array([1, 2, 3, 0])),
    "loop in a loop": lambda p, x: jax.vmap(
        lambda v, n: lax.fori_loop(
            0, n, lambda i, c: lax.fori_loop(0, i, lambda j, c: smaller(p, c), c), v
        )
    )(x, jnp.array([1, 2, 3, 0])),
}


@pytest.mark.parametrize("derive", [lambda f: f, jax.jacfwd], ids=["value", "jacfwd"])
@pytest.mark.parametrize("name", LOOPS)
def test_loop_whose_end_differs_by_example(name, derive):
    assert "w" in jaxlora.find_sites(LOOPS[name], {"w": W}, X)
    assert_equal_to_merged(LOOPS[name], derive=derive)


def test_weight_changed_in_a_loop_whose_end_differs_is_dense_and_told():
    def fn(p, x):
        return jax.vmap(lambda v, n: v @ lax.fori_loop(0, n, lambda i, w: jnp.tanh(w), p["w"]))(
            x, jnp.array([1, 2, 3, 0])
        )

    with pytest.warns(jaxlora.MaterializationWarning) as told:
        assert_equal_to_merged(fn, derive=jax.jacfwd)
    assert any("a loop carries it and changes it" in str(warning.message) for warning in told)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transpose", [False, True])
def test_scaling_too_large_for_float16_gives_no_nan_at_the_start(form, transpose):
    def fn(p, x):
        return x @ (p["w"].T if transpose else p["w"])

    params = jaxlora.init(
        jax.random.key(0),
        lambda p, x: x @ p["w"],
        {"w": W.astype(jnp.float16)},
        X.astype(jnp.float16),
        config=jaxlora.LoRAConfig(rank=2, alpha=1e6),
    )
    run = functools.partial(jaxlora.lora(fn, form=form), x=X.astype(jnp.float16))
    y, pull = jax.vjp(lambda b: run(jax.tree.map(lambda x: x, b)), params)
    assert_allclose(y, fn({"w": W.astype(jnp.float16)}, X.astype(jnp.float16)))
    assert jnp.isfinite(pull(jnp.full_like(y, 1e-4))[0]["w"].b).all()
