"""Control flow, derivatives of functions' own, and weights that are indexed or returned."""

import jax
import jax.numpy as jnp

from cases.base import Case, case, normal


def _mlp_params():
    return {"up": normal(0, 8, 12), "down": normal(2, 12, 8)}


def _mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@case
def inside_jit():
    return Case(jax.jit(_mlp), _mlp_params(), (normal(1, 5, 8),), compiled=True)


@case
def inside_remat_with_policy():
    policy = jax.checkpoint_policies.dots_saveable
    fn = jax.checkpoint(_mlp, policy=policy)
    return Case(fn, _mlp_params(), (normal(1, 5, 8),), compiled=True)


@case
def inside_vmap():
    fn = jax.vmap(_mlp, in_axes=(None, 0))
    tokens = {"up": 5, "down": 5}
    return Case(fn, _mlp_params(), (normal(1, 5, 8),), tokens=tokens)


@case
def stacked_layers():
    def fn(params, x):
        return jax.lax.scan(lambda x, layer: (x + _mlp(layer, x), None), x, params)[0]

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8),), compiled=True)


@case
def weight_shared_by_all_steps():
    def fn(params, x):
        return jax.lax.scan(lambda x, _: (x + _mlp(params, x), None), x, length=3)[0]

    return Case(fn, _mlp_params(), (normal(1, 5, 8),), compiled=True)


@case
def weights_out_of_a_scan():
    def fn(params, x):
        def step(x, layer):
            return x + _mlp(layer, x), jax.tree.map(jnp.transpose, layer)

        x, turned = jax.lax.scan(step, x, params)
        return x, turned["up"][1] @ x.T

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8),), compiled=True)


@case
def layers_indexed():
    def fn(params, x):
        for i in range(3):
            x = x + _mlp(jax.tree.map(lambda w, i=i: w[i], params), x)
        return x

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8),))


@case
def layer_indexed_by_an_input():
    def fn(params, x, i):
        return _mlp(jax.tree.map(lambda w: w[i], params), x)

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8), jnp.int32(1)))


@case
def expert_for_each_token():
    def fn(params, x, expert):
        return jnp.einsum("td,tdo->to", x, params["w"][expert])

    return Case(fn, {"w": normal(0, 3, 8, 6)}, (normal(1, 5, 8), jnp.array([0, 2, 1, 1, 0])))


@case
def rows_of_positions():
    def fn(params, x, i):
        return x @ params["w"] + params["position"][jnp.arange(5)] + params["position"][i][None]

    params = {"position": normal(0, 9, 6), "w": normal(2, 8, 6)}
    return Case(fn, params, (normal(1, 5, 8), jnp.int32(7)), targets=("position", "w"))


@case
def one_row_times_a_smaller_weight():
    def fn(params, i):
        return params["table"][i] @ params["w"] + params["table"][i + 1][:4]

    return Case(
        fn, {"table": normal(0, 9, 8), "w": normal(2, 8, 4)}, (jnp.int32(3),), ("table", "w")
    )


@case
def branches():
    def fn(params, x):
        return jax.lax.cond(
            x[0, 0] > 0, _mlp, lambda params, x: x @ params["up"] @ params["down"], params, x
        )

    return Case(fn, _mlp_params(), (normal(1, 5, 8),), compiled=True)


@jax.custom_jvp
def _scaled_product(x, w):
    return 2.0 * (x @ w)


@_scaled_product.defjvp
def _scaled_product_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return _scaled_product(x, w), 2.0 * (dx @ w + x @ dw)


@case
def inside_custom_jvp():
    def fn(params, x):
        return _scaled_product(jnp.tanh(_scaled_product(x, params["up"])), params["down"])

    return Case(fn, _mlp_params(), (normal(1, 5, 8),))


@case
def weights_returned():
    def fn(params, x):
        return {"y": x @ params["w"], "w": params["w"], "turned": params["w"].T, "step": 3}

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),))


@case
def gradient_of_a_cond_over_layers():
    def layer(w, x):
        grouped = w.reshape(2, 4, 6)
        return jax.lax.cond(
            x.sum() > 0,
            lambda w, x: jnp.einsum("gio,gi->o", w, x.reshape(2, 4)),
            lambda w, x: jnp.einsum("gio,gi->o", w, 2 * x.reshape(2, 4)),
            grouped,
            x,
        )

    def fn(params, x):
        slope = jax.grad(lambda x, w: jnp.sum(jnp.sin(layer(w, x))))
        return jax.vmap(slope)(x, params["w"])

    return Case(fn, {"w": normal(0, 3, 8, 6)}, (normal(1, 3, 8),), compiled=True)


@case
def gradient_of_convolutions_over_layers():
    def layer(w, x, groups):
        numbers = ("NCX", "IOX", "NCX")
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def fn(params, x):
        def slope(x, w, v):
            y = layer(v, layer(w, x, 1), 2)
            return jnp.sum(jnp.sin(y))

        return jax.vmap(jax.grad(slope))(x, params["dense"], params["depthwise"])

    params = {"dense": normal(0, 3, 3, 2, 3), "depthwise": normal(1, 3, 1, 2, 3)}
    return Case(fn, params, (normal(2, 3, 2, 3, 5),), rank=1)
