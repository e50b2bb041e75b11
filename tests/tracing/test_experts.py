"""Experts are a stack in every form that multiplies with them, and low-rank whatever is shared."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import experts
from cases.experts import FORMS, SHARED_FORMS, W, X
from numpy.testing import assert_allclose

import jaxlora

EVERY = FORMS | SHARED_FORMS
STACK = jaxlora.weights.Roles((0,), (1,), (2,))
KINDS = {  # of adapters: each expert its own, ``a`` shared among them, or ``b``
    "own": STACK,
    "a shared": jaxlora.weights.Roles((), (1,), (0, 2)),
    "b shared": jaxlora.weights.Roles((), (0, 1), (2,)),
}


def program(form):
    return lambda params, x: EVERY[form](params["w"], x)


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_a_stack(form):
    assert jaxlora.find_sites(program(form), {"w": W}, X)["w"].roles == STACK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", EVERY)
def test_every_kind_of_adapter_is_low_rank_in_every_form(form, kind):
    roles, rng = KINDS[kind], np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), "float32") for s in roles.factor_shapes(W.shape, 2))
    node = jaxlora.LoRAWeight(W, (jaxlora.Adapter(a, b, roles, 1.0, W.shape),))
    fn = program(form)

    def low(node):
        return jnp.sum(jaxlora.lora(fn, strict=True)({"w": node}, X) ** 2)

    def dense(node):
        return jnp.sum(fn(jaxlora.merge({"w": node}), X) ** 2)

    found = jaxlora.explain(fn, {"w": node}, X)
    assert {use.kind for use in found.uses["w"]} == {"contracted"}
    got, wanted = (jax.jit(jax.value_and_grad(f))(node) for f in (low, dense))
    assert_allclose(got[0], wanted[0], rtol=1e-5)
    for name in ("a", "b"):
        x, y = (getattr(found[1], name) for found in (got, wanted))
        assert_allclose(x, y, rtol=0, atol=1e-4 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    ("axes", "shapes"), [((0,), ((4, 8, 2), (4, 2, 6))), ((), ((8, 2), (2, 4, 6)))]
)
@pytest.mark.parametrize("form", ["dense", "dense, vmap", "scan", "several, einsum"])
def test_user_says_which_axes_are_a_stack(form, axes, shapes, key):
    config = jaxlora.LoRAConfig(rank=2, stack={"w": axes})
    params = jaxlora.init(key, program(form), {"w": W}, X, config=config)
    assert (params["w"].a.shape, params["w"].b.shape) == shapes
    term = params["w"].term
    term = dataclasses.replace(term, b=term.b + 0.1)
    params["w"] = dataclasses.replace(params["w"], terms=(term,))
    got = jaxlora.lora(program(form), strict=True)(params, X)
    assert_allclose(got, program(form)(jaxlora.merge(params), X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"v": (0,)}, "stack names 'v', which is no site; nearest: 'w'"),
        ({"w": (0,), ".*": (0,)}, "stack must name 'w' once"),
        ({"w": (3,)}, r"axes of 'w' of shape \(4, 8, 6\): got \(3,\)"),
        ({"w": (1,)}, r"leaves 'w' of shape \(4, 8, 6\) no in axis: the program has in=\(1,\)"),
        ({"w": (0, 2)}, "no out axis"),
        ({"w": (-1,)}, r"stack\['w'\] must be indices from 0"),
    ],
)
def test_axes_that_cannot_be_a_stack_are_refused(stack, message, key):
    def init():
        config = jaxlora.LoRAConfig(rank=2, stack=stack)
        return jaxlora.init(key, program("dense"), {"w": W}, X, config=config)

    with pytest.raises(ValueError, match=message):
        init()


def test_rows_of_a_table_that_are_multiplied_are_a_lookup():
    def fn(params, x):
        return x[:, :6] @ params["table"][experts.INDICES[:, 0]].T

    table = dataclasses.replace(jaxlora.find_sites(fn, {"table": W[0]}, X)["table"], uses=())
    assert table.roles == jaxlora.weights.Roles((), (0,), (1,))


def test_entries_that_are_also_read_are_a_stack():
    def fn(params, x):
        chosen = params["w"][experts.INDICES]
        return jnp.einsum("td,tkdf->tkf", x, chosen), chosen.sum()

    assert jaxlora.find_sites(fn, {"w": W}, X)["w"].roles == STACK
