"""Networks of OTT-JAX: potentials in Flax Linen and velocity fields in Flax NNX."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case, normal
from flax import nnx

from third_party.base import drawn, model

icnn: Any = pytest.importorskip("ott.neural.networks.icnn", reason="ott-jax is not installed")
potentials: Any = pytest.importorskip("ott.neural.networks.potentials")
mlp: Any = pytest.importorskip("ott.neural.networks.velocity_field.mlp")
unet: Any = pytest.importorskip("ott.neural.networks.velocity_field.unet")


@model
def ott_convex_network():
    network = icnn.ICNN(dim_data=4, dim_hidden=[6, 6], ranks=2, act_fn=jax.nn.softplus)
    x = normal(1, 5, 4)
    params = drawn(jax.eval_shape(network.init, jax.random.key(0), x))
    wide = ("quad_kernel", "w_xs_0/lin_kernel", "w_xs_1/lin_kernel", "w_zs_0")
    return Case(network.apply, params, (x,), targets=wide)


@model
def ott_map_of_a_potential():
    network = potentials.PotentialMLP(dim_hidden=[8, 6], act_fn=jax.nn.gelu)
    x = normal(1, 5, 4)
    params = drawn(jax.eval_shape(network.init, jax.random.key(0), x))

    def fn(params, x):
        return network.potential_gradient_fn(params["params"])(x)

    return Case(fn, params, (x,), targets=("Dense_0", "Dense_1"))


def of_nnx(build, *args):
    graphdef, state = nnx.split(nnx.eval_shape(build))

    def fn(state, *args):
        return nnx.merge(graphdef, state)(*args)

    return Case(fn, drawn(state), args)


@model
def ott_velocity_mlp():
    def build():
        return mlp.MLP(4, hidden_dims=(8, 6), rngs=nnx.Rngs(0))

    return of_nnx(build, jnp.array([0.2, 0.7]), normal(1, 2, 4))


@model
def ott_velocity_unet_blocks():
    def build():
        rngs = nnx.Rngs(0)
        return unet.TimestepEmbedSequential(
            unet.ResBlock(64, 8, dropout=0.0, down=True, rngs=rngs),
            unet.AttentionBlock(64, num_heads=2, rngs=rngs),
        )

    return of_nnx(build, normal(1, 2, 4, 4, 64), normal(2, 2, 8))
