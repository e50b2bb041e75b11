"""Products of one input share the product with their first factors."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from cases.base import normal
from counts import products
from numpy.testing import assert_allclose

import jaxlora

pytestmark = pytest.mark.once

X = normal(0, 2, 5, 8)


def attention(params, x):
    q, k, v = (jnp.einsum("btd,dnh->bnth", x, params[name]) for name in "qkv")
    y = jnp.einsum("bnth,bnsh,bnsf->btnf", q, k, v)
    return jnp.einsum("btnf,nfd->btd", y, params["out"])


def transposed(params, x):
    return jnp.sin(x @ params["q"]) + jnp.cos(x @ params["k"].T) + x @ params["v"]


def made_between(params, x):
    q = jnp.sin(x @ params["q"])
    k = x @ (2 * params["k"].astype(q.dtype)).reshape(8, 4)
    return q + k + x @ (params["v"] * jnp.arange(4.0)[None])


def stacked(params, x):
    y = jnp.einsum("btd,sdf->sbtf", x, params["q"])
    return jnp.sin(y) + jnp.einsum("btd,sdf->sbtf", x, params["k"])


def experts(params, x):
    x = jnp.stack([x, 2 * x, -x])
    gate = jax.nn.silu(jnp.einsum("ebtd,edf->ebtf", x, params["q"]))
    return gate * jnp.einsum("ebtd,edf->ebtf", x, params["k"])


def weight_first(params, x):
    columns = x[0].T
    return jnp.sin(params["q"].T @ columns) * (params["k"].T @ columns)


def scanned(params, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["q"]) * jnp.sin(x @ w["k"]), None

    return jax.lax.scan(layer, x, params)[0]


def remat(params, x):
    return jax.checkpoint(made_between)(params, x)


SHAPES = {
    attention: {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 3), "out": (2, 3, 8)},
    transposed: {"q": (8, 4), "k": (4, 8), "v": (8, 4)},
    made_between: {"q": (8, 4), "k": (8, 2, 2), "v": (8, 4)},
    stacked: {"q": (3, 8, 4), "k": (3, 8, 4)},
    experts: {"q": (3, 8, 4), "k": (3, 8, 4)},
    weight_first: {"q": (8, 4), "k": (8, 4)},
    scanned: {"q": (3, 8, 8), "k": (3, 8, 8)},
    remat: {"q": (8, 4), "k": (8, 2, 2), "v": (8, 4)},
}
SHARING = {attention: 3, transposed: 3, made_between: 3, remat: 3}


def adapted(fn, shapes=None):
    """Return the base and adapters of several ranks."""
    shapes = shapes or SHAPES[fn]
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    base, adapters = None, {}
    for rank, targets in ((1, ("q",)), (2, tuple({"k", "v", "out"} & set(shapes)))):
        config = jaxlora.LoRAConfig(rank=rank, targets=targets)
        base, some = jaxlora.split(jaxlora.init(jax.random.key(0), fn, params, X, config=config))
        adapters |= some
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(adapters)))
    return base, jax.tree.map(lambda f: 0.2 * jax.random.normal(next(keys), f.shape), adapters)


@pytest.fixture(params=SHAPES, ids=lambda fn: fn.__name__)
def fn(request):
    return request.param


@pytest.mark.parametrize("form", ["factored", "weight-side"])
def test_values_and_gradients_are_those_of_merged_weights(fn, form):
    base, adapters = adapted(fn)
    apply = jaxlora.lora(fn, strict=True, form=form)

    def low_rank(adapters, x):
        return apply(jaxlora.bind(base, adapters), x)

    def merged(adapters, x):
        return fn(jaxlora.merge(jaxlora.bind(base, adapters)), x)

    def everything(f, adapters, x):
        def loss(adapters, x):
            return jnp.mean(jnp.sin(f(adapters, x)))

        slope = jax.grad(loss, (0, 1))
        moved = jax.tree.map(jnp.ones_like, (adapters, x))
        twice = jax.grad(lambda args: optax.tree.vdot(slope(*args), moved))((adapters, x))
        forward = jax.jvp(f, (adapters, x), moved)
        one = {"q": adapters["q"]}
        of_one = jax.grad(lambda a, x: loss(adapters | a, x))(one, x)
        return forward, slope(adapters, x), twice, of_one, f(adapters, x)

    got = jax.jit(functools.partial(everything, low_rank))(adapters, X)
    wanted = jax.jit(functools.partial(everything, merged))(adapters, X)
    for y, z in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_allclose(y, z, rtol=0, atol=2e-5 * float(abs(z).max()))


def test_report_tells_how_many_share_an_input(fn):
    report = jaxlora.explain(fn, jaxlora.bind(*adapted(fn)), X)
    for path, uses in report.uses.items():
        assert [use.sharing for use in uses] == [1 if path == "out" else SHARING.get(fn, 2)]
    if fn is attention:
        assert "input shared by 3" in str(report)


def products_with(fn, size, *args):
    """Return how many products of a traced function have an operand of this size."""
    return sum(size in map(math.prod, shapes[:2]) for shapes in products(fn, *args))


def test_input_is_read_once_for_all_in_each_pass():
    base, adapters = adapted(transposed)
    apply = jaxlora.lora(transposed, form="factored")

    def loss(adapters):
        return jnp.sum(apply(jaxlora.bind(base, adapters), X))

    of_base = 3
    assert products_with(loss, X.size, adapters) == of_base + 1
    assert products_with(jax.grad(loss), X.size, adapters) == of_base + 2


def sharing_of(fn, params):
    uses = jaxlora.explain(fn, params, X).uses
    return {use.sharing for found in uses.values() for use in found}


def apart(params, x):
    return jnp.sin(x @ params["q"]) + (2 * x) @ params["k"]


def one_after_the_other(params, x):
    q = x @ params["q"]
    return x @ (params["k"] * jnp.mean(q @ params["v"]))


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (apart, {"q": (8, 4), "k": (8, 4)}),
        (one_after_the_other, {"q": (8, 4), "k": (8, 4), "v": (4, 2)}),
    ],
)
def test_products_that_share_nothing_stand_alone(fn, shapes):
    assert sharing_of(fn, jaxlora.bind(*adapted(fn, shapes))) == {1}


def test_products_with_dropout_stand_alone():
    params = jaxlora.bind(*adapted(transposed))
    assert sharing_of(transposed, jaxlora.dropout(params, jax.random.key(2), 0.5)) == {1}
