"""Products of a weight and an input, written in every way."""

import jax
import jax.numpy as jnp

from cases.base import Case, case, normal


def einsum(spec, *shape, x, on_left=False, **case):
    operands = (lambda w, x: (w, x)) if on_left else (lambda w, x: (x, w))
    return Case(
        lambda params, x: jnp.einsum(spec, *operands(params["w"], x)),
        {"w": normal(0, *shape)},
        (normal(1, *x),),
        **case,
    )


@case
def matmul():
    return einsum("bti,io->bto", 8, 6, x=(2, 5, 8), tokens={"w": 10})


@case
def matmul_of_one_row():
    return einsum("i,io->o", 8, 6, x=(8,), tokens={"w": 1})


@case
def weight_on_the_left():
    return einsum("io,it->ot", 8, 6, x=(8, 5), on_left=True, tokens={"w": 5})


@case
def several_contracted_axes():
    return einsum("tnh,nhd->td", 2, 4, 6, x=(5, 2, 4), tokens={"w": 5})


@case
def several_free_axes():
    return einsum("td,dnh->nth", 8, 2, 4, x=(5, 8), tokens={"w": 5})


@case
def contracted_axes_in_another_order():
    return einsum("ahbn,dnch->acbd", 6, 2, 3, 4, x=(3, 4, 5, 2), tokens={"w": 15})


@case
def stack_in_batch():
    return einsum("etd,edo->eto", 3, 8, 6, x=(3, 5, 8), tokens={"w": 15})


@case
def stack_in_batch_not_first():
    return einsum("etd,deo->teo", 8, 3, 6, x=(3, 5, 8), tokens={"w": 15})


@case
def all_experts_for_every_token():
    return einsum("td,edo->teo", 3, 8, 6, x=(5, 8))


@case
def weight_of_size_one():
    return einsum("td,dxo->txo", 8, 1, 6, x=(5, 8), tokens={"w": 5})


@case
def reshaped_and_transposed():
    def fn(params, x):
        w = params["w"].reshape(6, 2, 4).transpose(1, 2, 0)[None]
        return jnp.einsum("tnh,xnhd->xtd", x, w)

    return Case(fn, {"w": normal(0, 6, 8)}, (normal(1, 5, 2, 4),), tokens={"w": 5})


@case
def fused_projections():
    def fn(params, x):
        q, k, v = jnp.split(params["qkv"], 3, axis=1)
        return jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v)

    return Case(fn, {"qkv": normal(0, 8, 18)}, (normal(1, 5, 8),))


@case
def used_twice():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),), tokens={"w": 10})


@case
def integer_input():
    def fn(params, x):
        return jax.lax.dot(x, params["w"], preferred_element_type=jnp.float32)

    x = jnp.asarray(normal(1, 5, 8) * 10, jnp.int32)
    return Case(fn, {"w": normal(0, 8, 6)}, (x,))


@case
def half_precision_inside():
    def fn(params, x):
        return x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),))


@case
def half_precision_base():
    w = normal(0, 8, 6, dtype=jnp.bfloat16)
    x = normal(1, 5, 8, dtype=jnp.bfloat16)
    return Case(lambda params, x: x @ params["w"], {"w": w}, (x,))


@case
def float16_base():
    w, x = normal(0, 8, 6, dtype=jnp.float16), normal(1, 5, 8, dtype=jnp.float16)
    return Case(lambda params, x: x @ params["w"], {"w": w}, (x,))
