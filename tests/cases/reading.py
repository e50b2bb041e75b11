"""Weights that are looked up, cut and joined in every way."""

import jax
import jax.numpy as jnp

from cases.base import Case, case, normal


@case
def rows_for_each_of_a_batch():
    def fn(params, i):
        return jax.vmap(lambda table, i: table[i])(params["tables"], i)

    i = jnp.array([[0, 4, 8], [1, 1, 2]])
    return Case(fn, {"tables": normal(0, 2, 9, 6)}, (i,), ("tables",))


@case
def columns_looked_up():
    def fn(params, i):
        return jnp.take(params["table"], i, axis=1), params["table"][:, i[0]]

    return Case(fn, {"table": normal(0, 6, 9)}, (jnp.array([3, 8, 0]),), ("table",))


@case
def middle_axis_looked_up():
    def fn(params, i):
        return jnp.take(params["table"], i, axis=1)

    return Case(fn, {"table": normal(0, 4, 9, 3)}, (jnp.array([[3, 8], [0, 1]]),), ("table",))


@case
def windows_of_rows():
    def fn(params, i):
        def window(i):
            return jax.lax.dynamic_slice_in_dim(params["table"], i, 3)

        return jax.vmap(window)(i), window(i[0])

    return Case(fn, {"table": normal(0, 9, 6)}, (jnp.array([5, 0]),), ("table",))


@case
def experts_by_group():
    def fn(params, x):
        groups = jnp.array([2, 0, 4])
        h = jax.lax.ragged_dot(x, params["up"], groups)
        return jax.lax.ragged_dot(jnp.tanh(h), params["down"], groups)

    params = {"up": normal(0, 3, 8, 6), "down": normal(2, 3, 6, 8)}
    return Case(fn, params, (normal(1, 6, 8),))


@case
def joined_along_out():
    def fn(params, x):
        return x @ jnp.concatenate([params["q"], params["k"], params["v"]], axis=1)

    params = {"q": normal(0, 8, 6), "k": normal(1, 8, 4), "v": normal(2, 8, 4)}
    return Case(fn, params, (normal(3, 5, 8),))


@case
def joined_along_in_to_what_is_not_adapted():
    def fn(params, x, h):
        kernel = jnp.concatenate([params["x"], params["h"]])
        return jnp.concatenate([x, h], axis=1) @ kernel

    params = {"x": normal(0, 8, 6), "h": normal(1, 6, 6)}
    return Case(fn, params, (normal(3, 5, 8), normal(4, 5, 6)), targets=("h",))


@case
def layers_joined_to_a_stack():
    def fn(params, x):
        weights = jnp.stack([params["one"], params["two"], params["one"].T])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    params = {"one": normal(0, 8, 8), "two": normal(1, 8, 8)}
    return Case(fn, params, (normal(3, 5, 8),), targets=("two",), compiled=True)


@case
def stack_in_the_middle():
    def fn(params, x):
        return jnp.einsum("ti,iso->tso", x, jnp.stack([params["one"], params["two"]], axis=1))

    params = {"one": normal(0, 8, 6), "two": normal(1, 8, 6)}
    return Case(fn, params, (normal(3, 5, 8),))


@case
def rolled_and_padded():
    def fn(params, x):
        w = jnp.pad(jnp.roll(params["w"], 2, axis=0), ((0, 1), (2, 0)), constant_values=0.5)
        return jnp.pad(x, ((0, 0), (1, 0))) @ w

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(3, 5, 8),))


@case
def axes_of_size_one_rolled():  # joins the part with one that is empty
    def fn(params, x):
        last_row, last_column = params["w"][7:], params["w"][:, 5:]
        column = jnp.roll(last_column, 1, 1).reshape(-1)
        return x[:, :1] @ jnp.roll(last_row, 1, 0), jnp.einsum("bi,i->b", x, column)

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),))


@case
def scaled_along_every_axis():
    def fn(params, x):
        w = params["scale"] * (2.0 * params["w"]) / jnp.arange(1.0, 9.0)[:, None]
        return x @ -w

    params = {"w": normal(0, 8, 6), "scale": normal(1, 1, 6)}
    return Case(fn, params, (normal(3, 5, 8),), targets=("w",))


@case
def scaled_heads():
    def fn(params, x):
        heads = params["w"] * jnp.arange(1.0, 7.0).reshape(1, 2, 3)
        return jnp.einsum("ti,inh->tnh", x, heads).reshape(5, 6) @ params["w"].reshape(8, 6).T

    return Case(fn, {"w": normal(0, 8, 2, 3)}, (normal(3, 5, 8),), compiled=True)


def _convolve(x, kernel, **how):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), **how
    )


@case
def a_kernel_for_each_image():
    def fn(params, x):
        return jax.vmap(_convolve)(x, params["kernels"])

    return Case(fn, {"kernels": normal(0, 3, 2, 4, 5)}, (normal(1, 3, 2, 8, 4),))


@case
def all_kernels_for_each_image():
    def fn(params, x):
        return jax.vmap(_convolve, (None, 0))(x, params["kernels"])

    return Case(fn, {"kernels": normal(0, 3, 2, 4, 5)}, (normal(1, 2, 8, 4),))


@case
def kernel_shared_with_a_decoder():
    def fn(params, x):
        return _convolve(jnp.tanh(_convolve(x, params["k"])), params["k"].swapaxes(1, 2)[::-1])

    return Case(fn, {"k": normal(0, 3, 4, 5)}, (normal(1, 2, 8, 4),))


@case
def kernel_by_channels_first_and_dilated():
    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["k"], (2, 1), ((2, 1), (0, 3)), (1, 2), (2, 1), feature_group_count=2
        )

    return Case(fn, {"k": normal(0, 6, 2, 3, 2)}, (normal(1, 2, 4, 7, 8),))


@case
def kernel_in_three_dimensions():
    def fn(params, x):
        return jax.lax.conv_transpose(
            x, params["k"], (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )

    return Case(fn, {"k": normal(0, 2, 3, 2, 3, 4)}, (normal(1, 2, 3, 4, 3, 3),))


@case
def summed_along_axes():
    def fn(params, x):
        w, u = params["w"], params["u"]
        return jnp.einsum("ti,sijo->to", x, w), jnp.einsum("io,tn->ton", u, x), x @ w.sum((0, 2))

    params = {"w": normal(0, 3, 8, 2, 6), "u": normal(2, 8, 6)}
    return Case(fn, params, (normal(1, 5, 8),), ("w",))


@case
def repeated_along_new_axes():
    def fn(params, x):
        repeated = jnp.broadcast_to(params["w"], (2, 8, 6))
        each = jnp.einsum("bti,bio->bto", jnp.stack([x, 2 * x]), repeated)
        heads = x @ jnp.repeat(params["w"], 2, axis=1)
        twice = x @ repeated.sum(0)
        return each, heads, twice, jnp.tile(x, (1, 2)) @ jnp.tile(params["w"], (2, 1))

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),))


@case
def added_weights():
    def fn(params, x):
        return x @ (params["w"] - params["moved"] + params["plain"])

    params = {name: normal(i, 8, 6) for i, name in enumerate(("w", "moved", "plain"))}
    return Case(fn, params, (normal(3, 5, 8),), ("w", "moved"))


@case
def stack_of_one():
    def fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]
        return jnp.einsum("etd,edo->eto", x[None], params["experts"])

    return Case(
        fn, {"layers": normal(0, 1, 8, 8), "experts": normal(1, 1, 8, 6)}, (normal(2, 5, 8),)
    )


@case
def single_elements():
    def fn(params, rows, columns):
        picked = params["table"][rows, columns]
        return jnp.tanh(picked), params["table"][rows[:, None], columns[None]] * 2

    return Case(
        fn,
        {"table": normal(0, 6, 5)},
        (jnp.array([1, 5, 2]), jnp.array([0, 4, 4])),
        targets=("table",),
    )
