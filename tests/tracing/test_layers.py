"""Laws of layers, which are found in a program and traced as one function."""

import re

import jax
import jax.numpy as jnp
import pytest
from counts import op_names
from flax import nnx
from layered import (
    BLOCKS,
    LAYERS,
    X,
    adapted,
    assert_like_merged,
    attention,
    calls,
    gated,
    gradients,
    of,
)
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.known import Known


@pytest.mark.parametrize("named", [True, False], ids=["named", "without names"])
@pytest.mark.parametrize("block", BLOCKS)
def test_layers_are_one_function_and_compute_what_merged_ones_do(block, named):
    fn = of(block, named)
    tree = adapted(fn, X, names=BLOCKS[block])
    shared = calls(jaxlora.lora(fn), tree, X)
    assert len(shared) == LAYERS - 1  # all but the first
    assert len({*map(id, shared)}) == 1
    assert_like_merged(fn, tree, X)


@pytest.mark.parametrize("wrapped", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_layers_that_are_functions_of_jax_are_one_function(wrapped):
    fn = of(wrapped(attention), named=False)
    tree = adapted(fn, X)
    shared = calls(jaxlora.lora(fn), tree, X)
    assert len(shared) == LAYERS - 1
    assert len({*map(id, shared)}) == 1
    assert_like_merged(fn, tree, X)


@pytest.mark.once
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("magnitude", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("dropped", [0, 0.3], ids=["all", "dropout"])
def test_layers_of_every_kind_of_adapter_compute_what_single_ones_do(kind, magnitude, dropped):
    fn = of(attention)

    def by_themselves(params, x):  # each on a line of its own, so that none is like another
        x = attention(x, params["layer0"])
        x = attention(x, params["layer1"])
        x = attention(x, params["layer2"])
        x = attention(x, params["layer3"])
        return jnp.cos(attention(x, params["layer4"]))

    quantization = kind and jaxlora.QuantizationConfig(kind)
    tree = adapted(fn, X, quantization=quantization, magnitude=magnitude)
    if dropped:
        tree = jaxlora.dropout(tree, jax.random.key(1), dropped)
    assert calls(jaxlora.lora(fn), tree, X)
    assert not calls(jaxlora.lora(by_themselves), tree, X)
    ours = gradients(jaxlora.lora(fn, strict=True), tree, X)
    theirs = gradients(jaxlora.lora(by_themselves, strict=True), tree, X)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-4), ours, theirs)


def test_layers_of_two_kinds_in_turn_are_found_as_pairs():
    def fn(params, x):
        for i in range(4):
            x = attention(x, params[f"layer{i}"])
            x = gated(x, params[f"layer{i + 1}"])
        return x @ params["layer4"]["v"]

    tree = adapted(fn, X)
    shared = calls(jaxlora.lora(fn), tree, X)
    assert len(shared) == 3
    assert len({*map(id, shared)}) == 1
    assert_like_merged(fn, tree, X)


def test_layers_that_return_more_than_they_hand_on():
    fn = of(lambda x, w: (attention(x, w), jnp.abs(x @ w["q"]).mean()))
    tree = adapted(fn, X)
    assert len(calls(jaxlora.lora(fn), tree, X)) == LAYERS - 1
    assert_like_merged(fn, tree, X)


def test_layers_keep_their_names():
    fn = of(attention)
    tree = adapted(fn, X)

    def names(fn, params):
        found = (name for name in op_names(fn, params, X) if "/lora/" not in name)
        return {re.sub(r"jit\(repeated\)/", "", name) for name in found}

    assert names(jaxlora.lora(fn), tree) >= names(fn, jaxlora.merge(tree))


@pytest.mark.parametrize(
    ("ordered", "remat"),  # JAX has no ordered effects in what is rematerialized
    [(True, False), (False, False), (False, True)],
    ids=["ordered", "unordered", "rematerialized"],
)
def test_effects_of_layers_are_those_of_the_plain_ones(ordered, remat, capsys):
    def block(x, w):
        jax.debug.print("{}", x[0, 0, 0], ordered=ordered)
        return attention(x, w)

    fn = of(jax.checkpoint(block) if remat else block)
    tree = adapted(fn, X)

    def printed(run):
        capsys.readouterr()
        jax.block_until_ready(run())
        jax.effects_barrier()
        lines = [*map(float, capsys.readouterr().out.split())]
        return lines if ordered else sorted(lines)

    ours = printed(lambda: gradients(jaxlora.lora(fn), tree, X))
    theirs = printed(lambda: gradients(fn, tree, X, made=jaxlora.merge))
    assert ours
    assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [lambda f: f, jax.grad, jax.vmap], ids=["run", "grad", "vmap"])
def test_what_is_run_at_once_is_not_compiled_as_layers(how, caplog):
    fn = of(attention)
    base, adapters = jaxlora.split(adapted(fn, X))

    def total(adapters):
        return jaxlora.lora(fn)(jaxlora.bind(base, adapters), X).sum()

    if how is jax.vmap:
        adapters = jax.tree.map(lambda x: x[None], adapters)
    with jax.log_compiles():
        how(total)(adapters)
    assert "Compiling" in caplog.text
    assert "jit(repeated)" not in caplog.text


def test_layers_of_an_nnx_model_are_found():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)

        def __call__(self, x):
            return x + self.attention(self.norm(x))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    program = jax.make_jaxpr(lambda params, x: nnx.merge(graph, params)(x))(params, X)
    known = Known(compat.opened(program))
    pieces = known.pieces(known.whole, lambda var: True)
    assert len(pieces) == LAYERS
    assert all(layer is not None for _, layer in pieces)
