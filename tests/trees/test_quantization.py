"""Quantized weights: the laws on every case, NumPy, bytes and memory, and what cannot be."""

import dataclasses
import functools
import sys
from typing import Any

import cases
import jax
import jax.numpy as jnp
import pytest
from cases.base import trained as drawn
from numpy.testing import assert_allclose, assert_array_equal
from test_laws import assert_close, loss, parameters
from two_layers import X, model, weights

import jaxlora
from jaxlora import QuantizationConfig
from jaxlora.weights import paths
from jaxlora.weights.quantized import values


def all_sites(case) -> tuple[str, ...]:
    return tuple(jaxlora.find_sites(case.fn, case.params, *case.args).sites)


def quantized(case) -> Any:
    """Return the parameters of a case with every site quantized, also those without adapters."""
    config = QuantizationConfig(block_size=8, targets=all_sites(case))
    return jaxlora.quantize(case.fn, case.params, *case.args, config=config)


def grad(fn):
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), allow_int=True))


@pytest.mark.once
@pytest.mark.parametrize("make", parameters(cases.CASES))
def test_quantized_output_and_gradients_equal_dequantized(make):
    case = make()
    params = quantized(case)

    def with_gradient(fn, params, argnums):
        def outputs(*args):  # a weight that the program returns is returned quantized
            return jax.tree.map(values, fn(*args), is_leaf=paths.is_node)

        def of(params, args):
            return loss(outputs, params, *args)

        grad = jax.value_and_grad(of, argnums=argnums, allow_int=True)
        value, gradients = jax.jit(grad)(params, case.args)
        return value, gradients[-1]

    got = with_gradient(jaxlora.lora(case.fn, strict=True), params, (1,))
    wanted = with_gradient(case.fn, jaxlora.dequantize(params), (0, 1))
    assert_close(got, wanted, case.epsilon, ulps=128)


@pytest.mark.once
@pytest.mark.parametrize("make", parameters(cases.CASES))
@pytest.mark.filterwarnings("ignore:.*dequantized for:jaxlora.MaterializationWarning")
def test_adapted_output_and_gradients_equal_merged(make):
    case = make()
    config = jaxlora.LoRAConfig(rank=case.rank, alpha=3.0, targets=case.targets)
    params = jaxlora.init(jax.random.key(0), case.fn, quantized(case), *case.args, config=config)
    base, adapters = jaxlora.split(params)
    adapters = drawn(jax.random.key(0), adapters)

    def low_rank(adapters, args):
        return loss(jaxlora.lora(case.fn), jaxlora.bind(base, adapters), *args)

    def merged(adapters, args):
        return loss(case.fn, jaxlora.merge(jaxlora.bind(base, adapters)), *args)

    got, wanted = (grad(fn)(adapters, case.args) for fn in (low_rank, merged))
    assert_close(got, wanted, case.epsilon, ulps=256)


def layers(params, x):
    for layer in params:
        h = jax.nn.softmax(x @ layer["q"] @ (x @ layer["k"]).T) @ (x @ layer["v"])
        x = x + jnp.tanh(h @ layer["up"]) @ layer["down"]
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, layer: (layers([layer], x), None), x, params)[0]


SHAPES = {"q": (256, 256), "k": (256, 256), "v": (256, 256), "up": (256, 1024), "down": (1024, 256)}
LARGEST = 4 * 256 * 1024


@pytest.mark.parametrize("targets", ["all-linear", ("q",)], ids=str)
@pytest.mark.parametrize("fn", [layers, scanned])
def test_one_dequantized_weight_at_a_time(fn, targets, compiled):
    if fn is layers and tuple(map(int, jax.__version_info__)) < (0, 11):
        pytest.skip("XLA of JAX 0.10 orders operations on CPU as if memory were free")
    depth, x = 6, jax.ShapeDtypeStruct((16, 256), jnp.float32)
    lead = () if fn is layers else (depth,)
    layer = {n: jax.ShapeDtypeStruct((*lead, *s), jnp.float32) for n, s in SHAPES.items()}
    plain = [layer] * depth if fn is layers else layer
    config = jaxlora.LoRAConfig(rank=4, targets=targets)

    def temp(fn, *args):
        return compiled(fn, *args).memory_analysis().temp_size_in_bytes

    def programs(params):
        adapted = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
        base, adapters = jaxlora.split(adapted)

        def loss(adapters, base, x):
            return jnp.sum(jaxlora.lora(fn)(jaxlora.bind(base, adapters), x))

        return temp(jaxlora.lora(fn), adapted, x), temp(jax.grad(loss), adapters, base, x)

    small = jaxlora.quantize(fn, plain, x, config=QuantizationConfig())
    for quantized, usual in zip(programs(small), programs(plain), strict=True):
        assert quantized - usual <= 1.1 * LARGEST


@pytest.mark.parametrize("take", [jnp.split, jnp.unstack], ids=["split", "unstack"])
@pytest.mark.parametrize("adapted", [False, True], ids=["quantized", "adapted"])
def test_parts_of_a_quantized_weight_are_not_kept_as_they_are_made(take, adapted):
    shape = (64, 96) if take is jnp.split else (3, 64, 32)

    def fn(params, x):
        parts = take(params["w"], 3, axis=1) if take is jnp.split else take(params["w"])
        for part in parts:
            x = jnp.tanh(x @ part @ part.T)
        return x.sum()

    params = {"w": jax.random.normal(jax.random.key(0), shape) / 8}
    x = jnp.cos(jnp.arange(2 * 64.0)).reshape(2, 64)
    params = jaxlora.quantize(fn, params, x, config=QuantizationConfig("nf4", block_size=8))
    if adapted:
        config = jaxlora.LoRAConfig(rank=2)
        params = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    dense = jaxlora.merge(params) if adapted else jaxlora.dequantize(params)
    apply = functools.partial(jaxlora.lora(fn), params)
    assert_allclose(jax.grad(apply)(x), jax.grad(functools.partial(fn, dense))(x), atol=1e-5)
    _, backward = jax.vjp(apply, x)
    assert max(leaf.nbytes for leaf in jax.tree.leaves(backward)) < 64 * 32 * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "nf3"}, ValueError, "kind must be one of .* got 'nf3'"),
        ({"block_size": 1}, ValueError, "block_size must be at least 2: got 1"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int: got 64.0"),
        ({"targets": ()}, ValueError, "targets must name something"),
    ],
)
def test_bad_choices(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantizationConfig(**arguments)


def test_what_cannot_be_quantized():
    def quantize(params, **choices):
        return jaxlora.quantize(model, params, X, config=QuantizationConfig(**choices))

    done = quantize(weights())
    with pytest.raises(ValueError, match="'down' is quantized already"):
        quantize(done)
    with pytest.raises(ValueError, match="only whole weights can be quantized: got a part of 'up'"):
        quantize(weights(), targets=("up[:64]",))
    with pytest.raises(ValueError, match="target 'sideways'"):
        quantize(weights(), targets=("sideways",))
    with pytest.raises(ValueError, match="'up' holds NaN or inf"):
        quantize(weights() | {"up": weights()["up"].at[3, 4].set(jnp.inf)})
    config = jaxlora.LoRAConfig(rank=2, targets=("up",), train=("down",))
    trained = jaxlora.init(jax.random.key(0), model, weights(), X, config=config)
    with pytest.raises(ValueError, match="'down' is trained, and cannot be quantized"):
        quantize(trained)
    with pytest.raises(ValueError, match="no quantized weight"):
        jaxlora.dequantize(weights())


def test_what_quantized_weights_cannot_do():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())

    def init(initializer, params=params, **choices):
        config = jaxlora.LoRAConfig(rank=2, initializer=initializer, **choices)
        return jaxlora.init(jax.random.key(0), model, params, X, config=config)

    loftq = jaxlora.initializers.loftq
    with pytest.raises(ValueError, match="'loftq' makes up for quantizing, and 'down' is float32"):
        init(loftq(weights()), params=weights())
    with pytest.raises(ValueError, match="'loftq' starts from data"):
        init("loftq")
    with pytest.raises(ValueError, match="iterations must be at least 1: got 0"):
        loftq(weights(), iterations=0)
    with pytest.raises(ValueError, match="'loftq' has no weight 'down' as it was"):
        init(loftq({"up": weights()["up"]}))
    with pytest.raises(ValueError, match="'down' as it was must have the shape"):
        init(loftq(weights() | {"down": jnp.ones((3, 4))}))
    with pytest.raises(ValueError, match="'loftq' starts whole weights: got a part"):
        init(loftq(weights()), targets=("up[:64]",))
    with pytest.raises(ValueError, match=r"'pissa' takes its product out .* 'down' is quantized"):
        init("pissa")
    adapters = jaxlora.split(init("uniform"))[1]
    with pytest.raises(ValueError, match="'down' is quantized and cannot be unmerged"):
        jaxlora.unmerge(params, adapters)

    def loss(params, x):
        return jnp.sum(model(params, x))

    with pytest.raises(ValueError, match="'down' is quantized and has no gradient"):
        jaxlora.calibration.gradients(loss, params, [(X,)], config=jaxlora.LoRAConfig(rank=2))


@pytest.mark.parametrize("targets", [("up",), ("down",)])
def test_what_scales_a_quantized_weight_gets_its_gradient(targets):
    def normalized(params, x):
        return jnp.tanh(x @ (params["up"] * params["scale"])) @ params["down"]

    params = weights() | {"scale": jnp.linspace(1, 2, 256)[None]}
    params = jaxlora.quantize(normalized, params, X, config=QuantizationConfig())
    config = jaxlora.LoRAConfig(rank=2, targets=targets)
    params = jaxlora.init(jax.random.key(0), normalized, params, X, config=config)

    def of_scale(scale, params):
        return loss(jaxlora.lora(normalized), params | {"scale": scale}, X)

    got, wanted = (
        jax.grad(of_scale)(params["scale"], tree) for tree in (params, jaxlora.dequantize(params))
    )
    assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert jnp.abs(got).min() > 0


def test_what_is_trained_stays_when_the_rest_is_dequantized():
    params = jaxlora.quantize(model, weights(), X, config=QuantizationConfig())
    config = jaxlora.LoRAConfig(rank=2, targets=("up",), rows={"down": (3,)})
    params = jaxlora.init(jax.random.key(0), model, params, X, config=config)
    value = params["down"].value + 1
    moved = dataclasses.replace(params["down"].replacement, value=value)
    params["down"] = dataclasses.replace(params["down"], replacement=moved)
    plain = jaxlora.dequantize(params)
    assert_array_equal(plain["down"].value, params["down"].value)
    assert_allclose(jaxlora.lora(model)(plain, X), jaxlora.lora(model)(params, X), atol=1e-5)


def test_shapes_of_quantized_weights_become_plain_shapes():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights())
    made = jaxlora.quantize(model, shapes, X, config=QuantizationConfig())
    assert jaxlora.dequantize(made) == shapes


@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint])
def test_a_part_of_a_block_from_where_the_program_says(inner):
    def fn(params, x, start):
        cut = inner(lambda w, start: jax.lax.dynamic_slice_in_dim(w, start, 8, 0))
        rolled = jnp.roll(params["up"], start, 1)
        return x[:, :8] @ cut(params["up"], start) + x @ rolled

    params, start = {"up": weights()["up"]}, jnp.int32(13)
    params = jaxlora.quantize(fn, params, X, start, config=QuantizationConfig(targets=("up",)))
    got = jax.jit(jaxlora.lora(fn))(params, X, start)
    assert_allclose(got, fn(jaxlora.dequantize(params), X, start), atol=1e-5)


def test_a_function_with_its_own_derivative_tells_that_it_keeps_the_weight():
    case = cases.CASES["inside_custom_jvp"]()
    params = jaxlora.init(
        jax.random.key(0), case.fn, quantized(case), *case.args, config=case.config
    )
    with pytest.warns(jaxlora.MaterializationWarning, match="dequantized for a function with its"):
        jaxlora.lora(case.fn)(params, *case.args)


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"install jaxlora\[quantized\]"):
        jaxlora.quantize(model, weights(), X, config=QuantizationConfig())


@pytest.mark.parametrize("name", ["linen_layers_scanned", "linen_attention"])
def test_magnitudes_over_quantized_weights(name):
    case = cases.CASES[name]()
    config = jaxlora.LoRAConfig(rank=2, targets=case.targets, magnitude=True)
    params = jaxlora.init(jax.random.key(0), case.fn, quantized(case), *case.args, config=config)
    base, adapters = jaxlora.split(params)
    adapters = drawn(jax.random.key(0), adapters)
    bound = jaxlora.bind(base, adapters)
    got = jaxlora.lora(case.fn)(bound, *case.args)
    assert_close(got, case.fn(jaxlora.merge(bound), *case.args), case.epsilon, ulps=64)
