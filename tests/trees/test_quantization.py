"""Quantized weights: the laws on every case, NumPy, bytes and memory, and what cannot be."""

import dataclasses
import itertools
import sys
import typing
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import normal
from cases.base import trained as drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from test_laws import assert_close, loss, parameters

import jaxlora
from jaxlora import Quantization
from jaxlora.weights import paths
from jaxlora.weights.quantized import Code, Kind, values
from jaxlora.weights.quantized import quantized as quantized_weight

# the quantiles of the normal distribution of the paper's appendix E
NF4 = [-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]


def all_sites(case) -> tuple[str, ...]:
    return tuple(jaxlora.find_sites(case.fn, case.params, *case.args).sites)


def quantized(case) -> Any:
    """Return the parameters of a case with every site quantized, also those without adapters."""
    config = Quantization(block_size=8, targets=all_sites(case))
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


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def weights(dtype=jnp.float32):
    return {"up": normal(0, 128, 256, dtype=dtype), "down": normal(1, 256, 64, dtype=dtype)}


X = normal(2, 10, 128)


GRIDS = {"nf4": NF4, "int4": np.arange(-8, 8) / 7.5, "int8": np.arange(-128, 128) / 127.5}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("block", [16, 64])
def test_each_element_is_the_nearest_of_its_block(kind, block):
    params, grid = weights(), np.float64(GRIDS[kind])
    config = Quantization(kind, block_size=block, double=False)
    made = jaxlora.dequantize(jaxlora.quantize(model, params, X, config=config))
    for name, weight in params.items():
        blocks, got = (np.float64(x).reshape(-1, block, x.shape[1]) for x in (weight, made[name]))
        most = np.abs(blocks).max(1, keepdims=True)
        assert_allclose(np.abs((got / most)[..., None] - grid).min(-1), 0, atol=1e-6)
        nearest = np.abs((blocks / most)[..., None] - grid).min(-1)
        assert_allclose(np.abs(blocks - got) / most, nearest, atol=1e-6)


def test_logarithms_of_scales_are_quantized_to_a_part_in_254_of_theirs():
    single, double = (
        jaxlora.dequantize(
            jaxlora.quantize(model, weights(), X, config=Quantization(block_size=8, double=double))
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
    made = jaxlora.quantize(model, params, x, config=Quantization())
    assert jaxlora.dequantize(made)["up"].dtype == made["up"].dtype == jnp.bfloat16
    assert jaxlora.lora(model)(made, x).dtype == jnp.bfloat16


def test_bytes_are_those_of_codes_and_scales():
    params = {"w": normal(0, 4096, 64)}
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    x = jnp.ones((1, 4096))
    bits = {}
    for kind, double in itertools.product(typing.get_args(Kind), (False, True)):
        made = jaxlora.quantize(fn, params, x, config=Quantization(kind, double=double))
        bits[kind, double] = 8 * jaxlora.summary(made).total_bytes / params["w"].size
    assert bits["nf4", False] == bits["int4", False] == 4 + 32 / 64
    assert bits["int8", False] == 8 + 32 / 64
    assert bits["nf4", True] == 4 + 8 / 64 + 2 * 32 / 4096


def test_merge_makes_plain_or_quantizes_again_with_its_error():
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    config = jaxlora.LoRAConfig(rank=4, targets=("up",))
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), model, params, X, config=config))
    params = jaxlora.bind(base, drawn(jax.random.key(0), adapters))
    plain, errors = jaxlora.merge(params, with_error=True)
    delta = params["up"].delta()
    assert_allclose(plain["up"], values(base["up"]) + delta, rtol=1e-6, atol=1e-6)
    assert_allclose(plain["down"], values(base["down"]), rtol=1e-6)
    assert errors["up"] < 1e-6
    again, errors = jaxlora.merge(params, with_error=True, requantize=True)
    assert again["down"] is base["down"]
    assert (again["up"].code, again["up"].dtype) == (base["up"].code, base["up"].dtype)
    assert_allclose(jnp.abs(values(again["up"]) - plain["up"]).max(), errors["up"], rtol=1e-5)
    assert errors["up"] > 0.01


def test_donated_codes_are_deleted():
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    config = jaxlora.LoRAConfig(rank=4)
    adapted = jaxlora.init(jax.random.key(0), model, params, X, config=config)
    jaxlora.merge(adapted, donate=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_loftq_comes_nearer_to_the_weights_as_they_were():
    before = weights()
    params = jaxlora.quantize(model, before, X, config=Quantization())
    errors = [jnp.linalg.norm(jaxlora.dequantize(params)["up"] - before["up"])]
    for iterations in (1, 5):
        start = jaxlora.initializers.loftq(before, iterations=iterations)
        config = jaxlora.LoRAConfig(rank=16, alpha=8, initializer=start)
        made = jaxlora.init(jax.random.key(0), model, params, X, config=config)
        errors.append(jnp.linalg.norm(jaxlora.merge(made)["up"] - before["up"]))
        _, adapters = jaxlora.split(made)
        assert adapters["up"].changed == "loftq"
        with pytest.raises(ValueError, match="'up' was quantized anew for 'loftq'"):
            jaxlora.to_plain({"up": adapters["up"]}, {"up": adapters["up"]}, base=params)
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]
    residual = before["up"] - values(params["up"])
    best = jnp.sqrt(jnp.sum(jnp.linalg.svd(residual)[1][16:] ** 2))  # of any product of this rank
    assert_allclose(errors[1], best, rtol=1e-4)


def test_pissa_then_quantize_comes_nearer_too():
    config = jaxlora.LoRAConfig(rank=8, initializer="pissa")
    before, how = weights(), Quantization()
    started = jaxlora.init(jax.random.key(0), model, before, X, config=config)
    adapted = jaxlora.quantize(model, started, X, config=how)
    assert_array_equal(adapted["up"].a, started["up"].a)
    plain = jaxlora.dequantize(jaxlora.quantize(model, before, X, config=how))["up"]
    error, of_plain = (
        jnp.linalg.norm(w - before["up"]) for w in (jaxlora.merge(adapted)["up"], plain)
    )
    assert error < 0.95 * of_plain


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


def test_moments_are_those_of_the_weights_it_stands_for():
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    config = jaxlora.LoRAConfig(rank=4)
    found = jaxlora.moments(model, params, [(X,)], config=config)
    assert_allclose(found["up"][0], X.T @ X, rtol=1e-5, atol=1e-5)
    start = jaxlora.initializers.eva(found)
    config = jaxlora.LoRAConfig(rank=4, initializer=start)
    made = jaxlora.init(jax.random.key(0), model, params, X, config=config)
    assert made["up"].base is params["up"]


def test_saved_adapters_are_for_the_quantized_base(tmp_path):
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    made = jaxlora.init(jax.random.key(0), model, params, X, config=jaxlora.LoRAConfig(rank=4))
    base, adapters = jaxlora.split(made)
    jaxlora.save_adapters(tmp_path / "adapters", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    assert_array_equal(loaded["up"].a, adapters["up"].a)
    with pytest.raises(ValueError, match=r"'up' must be nf4.*got float32"):
        jaxlora.load_adapters(tmp_path / "adapters", base=weights())
    others = jaxlora.quantize(
        model, {"up": -weights()["up"], "down": weights()["down"]}, X, config=Quantization()
    )
    with pytest.raises(ValueError, match="'up' holds other values"):
        jaxlora.load_adapters(tmp_path / "adapters", base=others)
    with ocp.StandardCheckpointer() as checkpointer:  # the base itself, as any tree of arrays
        checkpointer.save(tmp_path / "base", base)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "base", jax.tree.map(ocp.utils.to_shape_dtype_struct, base)
        )
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(base), strict=True):
        assert_array_equal(x, y)


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

    small = jaxlora.quantize(fn, plain, x, config=Quantization())
    for quantized, usual in zip(programs(small), programs(plain), strict=True):
        assert quantized - usual <= 1.1 * LARGEST


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
        Quantization(**arguments)


def test_what_cannot_be_quantized():
    def quantize(params, **choices):
        return jaxlora.quantize(model, params, X, config=Quantization(**choices))

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
    params = jaxlora.quantize(model, weights(), X, config=Quantization())

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
        jaxlora.gradients(loss, params, [(X,)], config=jaxlora.LoRAConfig(rank=2))


@pytest.mark.parametrize("targets", [("up",), ("down",)])
def test_what_scales_a_quantized_weight_gets_its_gradient(targets):
    def normalized(params, x):
        return jnp.tanh(x @ (params["up"] * params["scale"])) @ params["down"]

    params = weights() | {"scale": jnp.linspace(1, 2, 256)[None]}
    params = jaxlora.quantize(normalized, params, X, config=Quantization())
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
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
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
    made = jaxlora.quantize(model, shapes, X, config=Quantization())
    assert jaxlora.dequantize(made) == shapes


@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint])
def test_a_part_of_a_block_from_where_the_program_says(inner):
    def fn(params, x, start):
        cut = inner(lambda w, start: jax.lax.dynamic_slice_in_dim(w, start, 8, 0))
        rolled = jnp.roll(params["up"], start, 1)
        return x[:, :8] @ cut(params["up"], start) + x @ rolled

    params, start = {"up": weights()["up"]}, jnp.int32(13)
    params = jaxlora.quantize(fn, params, X, start, config=Quantization(targets=("up",)))
    got = jax.jit(jaxlora.lora(fn))(params, X, start)
    assert_allclose(got, fn(jaxlora.dequantize(params), X, start), atol=1e-5)


def test_freeze_leaves_codes_as_they_are():
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    params = jaxlora.init(jax.random.key(0), model, params, X, config=jaxlora.LoRAConfig(rank=2))
    tx = jaxlora.freeze(optax.sgd(1.0))
    grads = jax.grad(lambda p: loss(jaxlora.lora(model), p, X), allow_int=True)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    with jax.numpy_dtype_promotion("standard"):  # an update is added to the codes in int8
        after: Any = optax.apply_updates(params, updates)
    for x, y in zip(*map(jax.tree.leaves, (after["up"].base, params["up"].base)), strict=True):
        assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert (after["up"].b != params["up"].b).all()


def test_merging_under_jit_donates_nothing_that_is_traced():
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    params = jaxlora.init(jax.random.key(0), model, params, X, config=jaxlora.LoRAConfig(rank=2))
    merged = jax.jit(lambda params: jaxlora.merge(params, donate=True))(params)
    assert_allclose(merged["up"], jaxlora.dequantize(params)["up"].base, atol=1e-6)


def test_extracted_adapters_make_up_for_the_rounding():
    params = jaxlora.quantize(model, weights(), X, config=Quantization())
    tuned = {name: w + 0.01 * normal(3, *w.shape) for name, w in weights().items()}
    plain, errors = jaxlora.dequantize(params), []
    for rank in (4, 32, 128):
        found = jaxlora.algebra.extract(params, tuned, rank)
        merged = jaxlora.merge(jaxlora.bind(params, found.adapters))
        errors.append(jnp.linalg.norm(merged["up"] - tuned["up"]))
    assert jnp.linalg.norm(plain["up"] - tuned["up"]) > errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4  # of full rank


def test_scales_far_apart_are_kept():
    blocks = jnp.repeat(jnp.where(jnp.arange(64) == 5, 1e4, 1.0), 64)[:, None]
    weight = normal(0, 4096, 4) * blocks
    for double, bound in ((False, 0.093), (True, 0.096)):
        made = values(quantized_weight(weight, Code("nf4", 64, double), 0))
        error = jnp.where(blocks == 1, made - weight, 0)
        assert jnp.linalg.norm(error) < bound * jnp.linalg.norm(jnp.where(blocks == 1, weight, 0))


def test_weights_times_a_number_have_another_fingerprint():
    def digest(params):
        params = jaxlora.quantize(model, params, X, config=Quantization())
        config = jaxlora.LoRAConfig(rank=2)
        params = jaxlora.init(jax.random.key(0), model, params, X, config=config)
        return jaxlora.split(params)[1]["up"].fingerprint.digest

    larger = jax.tree.map(lambda x: 2 * x, weights())
    assert digest(weights()) == digest(weights())
    assert digest(weights()) != digest(larger)


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
        jaxlora.quantize(model, weights(), X, config=Quantization())
