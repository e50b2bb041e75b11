"""Models of Haiku, pure functions by `hk.transform`."""

import jax
import jax.numpy as jnp
import pytest
from cases import Case, normal

from third_party.base import EVERY_WEIGHT, drawn, model

hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")


def of_haiku(forward, *args):
    transformed = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = map(drawn, jax.eval_shape(transformed.init, jax.random.key(0), *args))

    def fn(params, *args):
        return transformed.apply(params, state, *args)[0]

    return Case(fn, params, args, targets=EVERY_WEIGHT)


@model
def haiku_mlp():
    return of_haiku(lambda x: hk.nets.MLP([12, 6], activation=jnp.tanh)(x), normal(1, 5, 8))


@model
def haiku_attention():
    def forward(x):
        attention = hk.MultiHeadAttention(
            num_heads=2, key_size=4, w_init=hk.initializers.VarianceScaling()
        )
        return attention(x, x, x)

    return of_haiku(forward, normal(1, 2, 5, 8))


@model
def haiku_embedding():
    def forward(tokens):
        return hk.Linear(6)(jnp.tanh(hk.Embed(11, 8)(tokens)))

    return of_haiku(forward, jnp.arange(6).reshape(2, 3))


@model
def haiku_lstm():
    def forward(x):
        core = hk.DeepRNN([hk.LSTM(8), hk.GRU(6)])
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    return of_haiku(forward, normal(1, 4, 2, 8))


@model
def haiku_residual_blocks():
    def forward(x):
        group = hk.nets.ResNet.BlockGroup(
            channels=8,
            num_blocks=2,
            stride=2,
            bn_config={"decay_rate": 0.9},
            resnet_v2=True,
            bottleneck=True,
            use_projection=True,
        )
        return group(x, is_training=False, test_local_stats=True)

    return of_haiku(forward, normal(1, 2, 8, 8, 4))


@model
def haiku_mobile_convolutions():
    def forward(x):
        x = hk.DepthwiseConv2D(1, kernel_shape=3, name="depthwise")(x)
        x = jnp.tanh(hk.Conv2D(6, kernel_shape=1, name="pointwise")(x))
        return hk.Conv2DTranspose(4, kernel_shape=3, stride=2, name="upward")(x)

    return of_haiku(forward, normal(1, 2, 6, 6, 4))


@model
def haiku_layer_stack():
    def forward(x):
        def block(x):
            h = hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)
            return x + hk.Linear(8)(jax.nn.gelu(hk.Linear(12)(h)))

        return hk.experimental.layer_stack(3)(block)(x)

    return of_haiku(forward, normal(1, 5, 8))
