"""Laws of equations that come again in a program, as those of its layers do."""

import re
from collections import Counter

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from cases.base import normal
from counts import equations, op_names, repeated
from hypothesis import given, settings
from jax import lax
from numpy.testing import assert_allclose

import jaxlora

X = normal(0, 4, 8)
LAYERS = 5


def norm(h, x):
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 0.5)


def other_norm(h, x):
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 0.7)


def along_rows(h, x):
    h = h - h.mean(0, keepdims=True)
    return h / jnp.sqrt((h * h).mean(0, keepdims=True) + 0.5)


def sign_of_zero(zero):
    return lambda h, x: h + jnp.sign(1 / (jnp.abs(h).max() * zero))


def random(h, x):
    key = jax.random.key(h.shape[-1])
    return jnp.where(jax.random.bernoulli(key, 0.7, h.shape), h, 0) + jax.random.normal(key)


def of_several(h, x):
    largest, where = lax.top_k(h, 3)
    return h + largest.sum(-1, keepdims=True) + jnp.where(where[:, :1] > 2, 1.0, -1.0)


BLOCKS = {
    "norm": norm,
    "other norm": other_norm,
    "along rows": along_rows,
    "zero": sign_of_zero(0.0),
    "negative zero": sign_of_zero(-0.0),
    "random": random,
    "of several": of_several,
    "softmax": lambda h, x: jax.nn.softmax(h) + jax.nn.relu(h),
    "gated": lambda h, x: jax.nn.silu(h) * h + jnp.logaddexp(h, 1.0),
    "from the start": lambda h, x: h + jnp.sin(x),
    "attention": lambda h, x: jax.nn.softmax(h @ x.T) @ h,
    "remat": jax.checkpoint(norm),
    "loop": lambda h, x: lax.fori_loop(0, 2, lambda i, h: norm(h, x) + i, h),
}


def of(blocks, remat=False):
    def fn(params, x):
        h = x * 0.9
        for i, name in enumerate(blocks):

            def layer(h, x, w, scale, block=BLOCKS[name], scope=f"layer{i}"):
                with jax.named_scope(scope):
                    with jax.named_scope("block"):
                        h = block(h, x)
                    return jnp.tanh(h @ w * 0.25) * scale

            layer = jax.checkpoint(layer) if remat else layer
            h = layer(h, x, params[f"w{i}"], params["scale"])
        return h

    return fn


def adapted(fn, layers=LAYERS, quantization=None, magnitude=False):
    params = {f"w{i}": normal(i, 8, 8) for i in range(layers)} | {"scale": normal(9, 1, 8)}
    if quantization is not None:
        params = jaxlora.quantize(fn, params, X, config=quantization)
    config = jaxlora.LoRAConfig(rank=2, targets=r"w\d+", magnitude=magnitude)
    tree = jaxlora.init(jax.random.key(0), fn, params, X, config=config)
    base, adapters = jaxlora.split(tree)
    leaves, treedef = jax.tree.flatten(adapters)
    moved = [x + normal(i, *x.shape) for i, x in enumerate(leaves)]
    return jaxlora.bind(base, jax.tree.unflatten(treedef, moved))


def assert_same(low_rank, fn, tree, made=jaxlora.merge):
    """Check values and gradients, of factors and input, against a function of what is made."""
    base, adapters = jaxlora.split(tree)

    def with_gradients(fn, make):
        def loss(adapters, x):
            return jnp.sum(jnp.cos(fn(make(jaxlora.bind(base, adapters)), x)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(adapters, X)

    ours, theirs = with_gradients(low_rank, lambda tree: tree), with_gradients(fn, made)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-3, atol=2e-4), ours, theirs)


@pytest.mark.once
@settings(max_examples=30, deadline=None, database=None)
@given(st.lists(st.sampled_from([*BLOCKS]), min_size=1, max_size=LAYERS), st.data())
def test_a_program_of_layers_computes_what_the_merged_one_does(blocks, data):
    again = data.draw(st.sampled_from([blocks, blocks[::-1]]))
    blocks = data.draw(st.sampled_from([[*blocks, *again], [*blocks * 4, "norm"][:9]]))
    fn = of(blocks, remat=data.draw(st.booleans()))
    assert_same(jaxlora.lora(fn, strict=True), fn, adapted(fn, len(blocks)))


@pytest.mark.parametrize("magnitude", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dropped", [0, 0.3], ids=["all", "dropout"])
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_layers_that_are_rematerialized_compute_what_others_do(magnitude, dropped, kind):
    fn, plain = of(["norm"] * LAYERS, remat=True), of(["norm"] * LAYERS)
    quantization = kind and jaxlora.QuantizationConfig(kind)
    tree = adapted(fn, quantization=quantization, magnitude=magnitude)
    if dropped:
        tree = jaxlora.dropout(tree, jax.random.key(1), dropped)
    assert_same(jaxlora.lora(fn, strict=True), jaxlora.lora(plain), tree, made=lambda tree: tree)


@pytest.mark.parametrize("block", ["norm", "random", "of several", "softmax", "gated", "attention"])
def test_equal_layers_share_one_function(block):
    fn = of([block] * LAYERS)
    calls = repeated(jax.make_jaxpr(jaxlora.lora(fn))(adapted(fn), X))
    times = Counter(map(id, calls)).values()
    assert min(times) >= LAYERS - 2  # one is written out, and what begins before the layers
    grad = jax.grad(lambda tree, x: jaxlora.lora(fn)(tree, x).sum(), allow_int=True)
    forward_and_back = repeated(jax.make_jaxpr(grad)(adapted(fn), X))
    assert len({*map(id, forward_and_back)}) <= 2 * len({*map(id, calls)})


@pytest.mark.parametrize(
    "blocks",
    [["norm", "other norm"], ["norm", "along rows"], ["zero", "negative zero"], ["norm"]],
    ids=" and ".join,
)
def test_layers_that_differ_share_nothing_of_their_blocks(blocks):
    fn = of(blocks)
    shared = repeated(jax.make_jaxpr(jaxlora.lora(fn))(adapted(fn, len(blocks)), X))
    assert not [eqn for program in shared for eqn in equations(program, "div")]


def test_lines_that_differ_share_nothing():
    def fn(params, x):
        h = jnp.tanh(norm(x, x) @ params["w0"]) * params["scale"]
        return jnp.tanh(norm(h, x) @ params["w1"]) * params["scale"]

    assert not repeated(jax.make_jaxpr(jaxlora.lora(fn))(adapted(fn, 2), X))


@pytest.mark.parametrize("remat", [False, True], ids=["as it is", "rematerialized"])
def test_layers_keep_their_names(remat):
    fn = of(["norm"] * LAYERS, remat)
    tree = adapted(fn)

    def names(fn, params):
        found = (name for name in op_names(fn, params, X) if "/lora/" not in name)
        return {re.sub(r"jit\(repeated\)/|checkpoint/", "", name) for name in found}

    assert names(jaxlora.lora(fn), tree) >= names(fn, jaxlora.merge(tree))


def test_layers_that_are_rematerialized_are_one_function():
    fn = of(["norm"] * LAYERS, remat=True)
    shared = repeated(jax.make_jaxpr(jaxlora.lora(fn))(adapted(fn), X))
    assert len(shared) == LAYERS - 1
    assert len({*map(id, shared)}) == 1


def made_dense(h, w):
    return h @ jnp.sin(w)


def returned(h, w):
    return h @ w, w


@pytest.mark.parametrize("layer", [made_dense, returned])
def test_each_weight_that_is_made_dense_in_a_layer_is_told_by_its_name(layer):
    def fn(params, x):
        for i in range(LAYERS):
            out = jax.checkpoint(layer)(x, params[f"w{i}"])
            x = out if layer is made_dense else out[0] @ jnp.sin(out[1])
        return x * params["scale"]

    tree = adapted(fn)
    with pytest.warns(jaxlora.MaterializationWarning) as told:
        y = jax.jit(jaxlora.lora(fn))(tree, X)
    named = {name for warning in told for name in re.findall(r"'(w\d)'", str(warning.message))}
    assert named == {f"w{i}" for i in range(LAYERS)}
    assert_allclose(y, fn(jaxlora.merge(tree), X), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="'w0' reaches 'sin'"):
        jax.jit(jaxlora.lora(fn, strict=True))(tree, X)


def test_effects_stay_in_their_order(capsys):
    def fn(params, x):
        for i in range(3):
            x = norm(x, x)
            jax.debug.print("layer {}", i, ordered=True)
            x = norm(x @ params[f"w{i}"], x) * params["scale"]
        return x

    tree = adapted(fn, 3)
    capsys.readouterr()
    jax.jit(jaxlora.lora(fn))(tree, X).block_until_ready()
    jax.effects_barrier()
    assert capsys.readouterr().out == "layer 0\nlayer 1\nlayer 2\n"


def test_what_is_not_traced_is_not_compiled(caplog):
    fn = of(["norm"] * LAYERS)
    tree = adapted(fn)
    with jax.log_compiles():
        ours = jaxlora.lora(fn)(tree, X)
    assert "jit(chain)" in caplog.text
    assert "jit(repeated)" not in caplog.text
    assert_allclose(ours, fn(jaxlora.merge(tree), X), rtol=1e-5, atol=1e-6)
