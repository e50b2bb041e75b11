"""Models of Keras 3 on its JAX backend, pure functions by `stateless_call`."""

import os
from typing import Any

import jax.numpy as jnp
import pytest
from cases import Case, normal

from third_party.base import EVERY_WEIGHT, drawn, model

os.environ["KERAS_BACKEND"] = "jax"  # read once, when keras is imported
keras: Any = pytest.importorskip("keras", reason="keras is not installed")
layers: Any = keras.layers


def of_keras(inputs, outputs, *args):
    network = keras.Model(inputs, outputs)
    fixed = [variable.value for variable in network.non_trainable_variables]
    order = [variable.path for variable in network.trainable_variables]

    def fn(params, *args):
        weights = [params[path] for path in order]
        return network.stateless_call(weights, fixed, *args, training=False)[0]

    params = drawn({variable.path: variable.value for variable in network.trainable_variables})
    return Case(fn, params, args, targets=EVERY_WEIGHT)


@model
def keras_transformer():
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 8)(tokens)
    x = x + layers.MultiHeadAttention(2, 4)(layers.LayerNormalization()(x), x)
    h = layers.EinsumDense("btd,dnh->btnh", (5, 3, 4), bias_axes="nh")(x)
    x = x + layers.EinsumDense("btnh,nhd->btd", (5, 8))(keras.ops.gelu(h))
    outputs = layers.Dense(6)(layers.RMSNormalization()(x))
    return of_keras(tokens, outputs, jnp.arange(10).reshape(2, 5))


@model
def keras_convolutions():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="gelu")(image)
    x = layers.Conv2D(8, 3, strides=2, groups=2)(x)
    x = layers.BatchNormalization()(x)
    x = layers.SeparableConv2D(6, 3, padding="same")(x)
    x = layers.Conv2DTranspose(4, 3, strides=2)(x)
    outputs = layers.Dense(5)(layers.GlobalAveragePooling2D()(x))
    return of_keras(image, outputs, normal(1, 2, 8, 8, 3))


@model
def keras_recurrent_network():
    series = keras.Input((4, 8))
    x = layers.LSTM(6, return_sequences=True)(series)
    outputs = layers.Bidirectional(layers.GRU(5))(x)
    return of_keras(series, outputs, normal(1, 2, 4, 8))
