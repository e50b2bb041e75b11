"""Codes and scales of quantized weights, against NumPy."""

import itertools
import typing

import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from cases import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from two_layers import X, model, weights

import jaxlora
from jaxlora import QuantizationConfig
from jaxlora.weights.quantized import Code, Kind, values
from jaxlora.weights.quantized import quantized as quantized_weight

# the quantiles of the normal distribution of the paper's appendix E
NF4 = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]

NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]

GRIDS = {"nf4": NF4, "int4": np.arange(-8, 8) / 7.5, "int8": np.arange(-128, 128) / 127.5}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("block", [16, 64])
def test_each_element_is_the_nearest_of_its_block(kind, block):
    params, grid = weights(), np.float64(GRIDS[kind])
    config = QuantizationConfig(kind, block_size=block, double=False)
    made = jaxlora.dequantize(jaxlora.quantize(model, params, X, config=config))
    for name, weight in params.items():
        blocks, got = (np.float64(x).reshape(-1, block, x.shape[1]) for x in (weight, made[name]))
        most = np.abs(blocks).max(1, keepdims=True)
        assert_allclose(np.abs((got / most)[..., None] - grid).min(-1), 0, atol=1e-6)
        nearest = np.abs((blocks / most)[..., None] - grid).min(-1)
        assert_allclose(np.abs(blocks - got) / most, nearest, atol=1e-6)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(("size", "block"), [(64, 16), (30, 5), (30, 15), (45, 15), (7, 7)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_packed_codes_are_unpacked_as_qwix_made_them(kind, size, block, axis):
    weight = jnp.moveaxis(normal(0, size, 3, 4), 0, axis)
    got = values(quantized_weight(weight, Code(kind, block, False), axis))
    others = [i for i in range(3) if i != axis]
    how = {"channelwise_axes": others, "tiled_axes": {axis: block}}
    kind = kind if kind == "nf4" else jnp.dtype(kind)
    assert_array_equal(got, qwix.dequantize(qwix.quantize(weight, kind, **how)))


def test_logarithms_of_scales_are_quantized_to_a_part_in_254_of_theirs():
    single, double = (
        jaxlora.dequantize(
            jaxlora.quantize(
                model, weights(), X, config=QuantizationConfig(block_size=8, double=double)
            )
        )
        for double in (False, True)
    )
    for name, weight in weights().items():
        scales = jnp.log(jnp.abs(weight.reshape(-1, 8, weight.shape[1])).max(1))
        bound = jnp.abs(scales - scales.mean(0, keepdims=True)).max(0) / 254
        error = jnp.abs(double[name] / jnp.where(single[name] == 0, 1, single[name]) - 1)
        error = jnp.where(single[name] == 0, 0, error).max(0)
        assert (error > 0).all()
        assert (error <= 1.02 * bound).all()


@pytest.mark.once
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    axis=st.integers(0, 2),
    code=st.builds(Code, st.sampled_from(typing.get_args(Kind)), st.integers(2, 64), st.booleans()),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=20)
def test_any_shape_is_near_and_tells_its_axis(shape, axis, code, seed):
    weight = normal(seed, *shape).at[0].set(0)  # a row of zeros, as that of a token for padding
    made = quantized_weight(weight, code, axis)
    assert made.shape == shape
    assert made.axis == axis or made.shape[axis] == 1
    most = jnp.abs(weight).max(axis, keepdims=True)
    bound = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.16}[code.kind]
    assert (jnp.abs(values(made) - weight) <= (bound + 0.02) * most + 1e-6).all()
    assert_array_equal(values(made)[0], 0)


def test_weights_of_half_precision_keep_their_dtype():
    params = weights(jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    made = jaxlora.quantize(model, params, x, config=QuantizationConfig())
    assert jaxlora.dequantize(made)["up"].dtype == made["up"].dtype == jnp.bfloat16
    assert jaxlora.lora(model)(made, x).dtype == jnp.bfloat16


def test_bytes_are_those_of_codes_and_scales():
    params = {"w": normal(0, 4096, 64)}
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    x = jnp.ones((1, 4096))
    bits = {}
    for kind, double in itertools.product(typing.get_args(Kind), (False, True)):
        made = jaxlora.quantize(fn, params, x, config=QuantizationConfig(kind, double=double))
        bits[kind, double] = 8 * jaxlora.summary(made).total_bytes / params["w"].size
    assert bits["nf4", False] == bits["int4", False] == 4 + 32 / 64
    assert bits["int8", False] == 8 + 32 / 64
    assert bits["nf4", True] == 4 + 8 / 64 + 2 * 32 / 4096


def test_scales_far_apart_are_kept():
    blocks = jnp.repeat(jnp.where(jnp.arange(64) == 5, 1e4, 1.0), 64)[:, None]
    weight = normal(0, 4096, 4) * blocks
    for double, bound in ((False, 0.093), (True, 0.096)):
        made = values(quantized_weight(weight, Code("nf4", 64, double), 0))
        error = jnp.where(blocks == 1, made - weight, 0)
        assert jnp.linalg.norm(error) < bound * jnp.linalg.norm(jnp.where(blocks == 1, weight, 0))
