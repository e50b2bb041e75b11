"""Laws of layers, which are found in a program and traced as one function."""

import re

import jax
import jax.numpy as jnp
import pytest
from cases.base import normal
from counts import equations, op_names, products, repeated
from flax import nnx
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.known import Known

X = normal(0, 4, 6, 8)
LAYERS = 5


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 0.5)


def attention(x, w):
    h = norm(x)
    q, k, v = (jnp.reshape(h @ w[name], (4, 6, 2, 4)) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ w["o"]


def gated(x, w):
    h = norm(x)
    return x + (jax.nn.silu(h @ w["q"]) * (h @ w["k"])) @ w["o"]


def masked(x, w):
    return jnp.where(jnp.abs(x) < 2, x + jnp.tanh(norm(x) @ w["v"]) @ w["o"], x)


def transposed(x, w):
    return x + jnp.tanh(norm(x) @ (w["q"].T + w["k"])) @ w["o"].reshape(8, 2, 4).reshape(8, 8)


BLOCKS = {attention: "qkvo", gated: "qko", masked: "vo", transposed: "qko"}  # and their weights


def of(block, named=True):
    """Return a model of layers; of a block that returns two values the second are summed."""

    def fn(params, x):
        told = []
        for i in range(LAYERS):
            with jax.named_scope(f"layer{i}" if named else "layers"):
                found = block(x, params[f"layer{i}"])
            x, *rest = found if isinstance(found, tuple) else (found,)
            told += rest
        return jnp.cos(x) + sum(told)

    return fn


def adapted(fn, *args, names="qkvo", layers=range(LAYERS), quantization=None, **config):
    params = {
        f"layer{i}": {name: normal(i, 8, 8) * 0.3 for i, name in enumerate(names, 4 * i)}
        for i in range(LAYERS)
    }
    targets = tuple(f"layer{i}/{name}" for i in layers for name in names)
    if quantization is not None:
        params = jaxlora.quantize(fn, params, *args, config=quantization)
    return moved(fn, params, *args, config=jaxlora.LoRAConfig(rank=2, targets=targets, **config))


def moved(fn, params, *args, config):
    """Return params with adapters that were trained."""
    tree = jaxlora.init(jax.random.key(0), fn, params, *args, config=config)
    base, adapters = jaxlora.split(tree)
    leaves, treedef = jax.tree.flatten(adapters)
    leaves = [x + 0.3 * normal(i, *x.shape) for i, x in enumerate(leaves)]
    return jaxlora.bind(base, jax.tree.unflatten(treedef, leaves))


def calls(fn, *args):
    """Return the functions of whole layers in a program of fn, one for each call."""
    return [p for p in repeated(jax.make_jaxpr(fn)(*args)) if [*equations(p, "dot_general")]]


def gradients(fn, tree, *args, made=lambda tree: tree):
    """Return value and gradients of the factors and all arguments of a function of trees."""
    base, adapters = jaxlora.split(tree)

    def loss(adapters, *args):
        return jnp.sum(fn(made(jaxlora.bind(base, adapters)), *args) ** 2)

    which = tuple(range(len(args) + 1))
    return jax.jit(jax.value_and_grad(loss, argnums=which))(adapters, *args)


def assert_like_merged(fn, tree, *args):
    ours = gradients(jaxlora.lora(fn, strict=True), tree, *args)
    theirs = gradients(fn, tree, *args, made=jaxlora.merge)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-3, atol=1e-3), ours, theirs)


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


def test_layers_that_differ_in_one_number_are_not_one_function():
    def fn(params, x):
        for i in range(LAYERS):
            w = params[f"layer{i}"]
            x = x + jnp.tanh(norm(x) @ w["q"] * (i + 1)) @ w["o"]
        return x

    tree = adapted(fn, X, names="qo")
    assert not calls(jaxlora.lora(fn), tree, X)
    assert_like_merged(fn, tree, X)


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


def test_layers_with_and_without_adapters_are_told_apart():
    fn = of(attention)
    tree = adapted(fn, X, layers=[0, 2, 4])
    assert calls(jaxlora.lora(fn), tree, X)
    assert_like_merged(fn, tree, X)


def test_layers_that_return_more_than_they_hand_on():
    fn = of(lambda x, w: (attention(x, w), jnp.abs(x @ w["q"]).mean()))
    tree = adapted(fn, X)
    assert len(calls(jaxlora.lora(fn), tree, X)) == LAYERS - 1
    assert_like_merged(fn, tree, X)


def test_products_of_one_input_in_all_layers_still_share_it():
    def fn(params, x, memory):
        for i in range(LAYERS):
            w = params[f"layer{i}"]
            read = jax.nn.softmax(norm(x) @ (memory @ w["k"]).mT) @ (memory @ w["v"])
            x = x + read @ w["o"]
        return x

    memory = normal(99, 4, 3, 8)
    tree = adapted(fn, X, memory, names="kvo")
    operands = [shape for shapes in products(jaxlora.lora(fn), tree, X, memory) for shape in shapes]
    assert operands.count((8, 2 * 2 * LAYERS)) == 1  # the first factors of all, side by side
    assert (8, 2 * 2) not in operands  # those of one layer
    assert_like_merged(fn, tree, X, memory)


def test_one_weight_is_selected_as_one_and_two_are_told_by_their_names():
    """What is selected between is one weight in some layers, and two in others."""

    def fn(params, x):
        for i in range(2 * LAYERS):
            w, other = params[f"layer{i % LAYERS}"], "qk"[i >= LAYERS]
            chosen = jax.lax.select(x[0, 0, 0] > 0, w["q"], w[other])
            x = x + jnp.tanh(norm(x) @ chosen) @ w["o"]
        return x

    tree = adapted(fn, X, names="qko")
    with pytest.warns(jaxlora.MaterializationWarning) as told:
        ours = gradients(jaxlora.lora(fn), tree, X)
    named = re.findall(r"'(\S+)' reaches", " ".join(str(warning.message) for warning in told))
    assert {*named} == {f"layer{i}/{name}" for i in range(LAYERS) for name in "qk"}
    theirs = gradients(fn, tree, X, made=jaxlora.merge)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=2e-3, atol=1e-3), ours, theirs)


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_known_of_a_predicate_is_not_taken_from_another_layer(first):
    """By one predicate all of a stack gets its gradient, or by one for each its entry does.

    Which of the two a layer selects by stands before the layers, and is not the same for all.
    """

    def fn(params, x):
        for_all = jnp.broadcast_to(x[0, 0, 0] > -9, (2, 8, 8))
        for_each = jnp.broadcast_to((jnp.array([-9.0, 9.0]) > x[0, 0, 0])[:, None, None], (2, 8, 8))
        predicates = [for_all, for_each, for_each, for_all, for_each, for_all]
        for i in range(LAYERS):
            w = params[f"layer{i}"]
            chosen = jax.lax.select(predicates[i + first], w, jax.lax.stop_gradient(w))
            x = x + jnp.tanh(jnp.einsum("bti,sio->bto", norm(x), chosen))
        return x

    params = {f"layer{i}": normal(i, 2, 8, 8) * 0.3 for i in range(LAYERS)}
    stack = dict.fromkeys(params, (0,))
    tree = moved(fn, params, X, config=jaxlora.LoRAConfig(rank=2, stack=stack))
    assert calls(jaxlora.lora(fn), tree, X)
    assert_like_merged(fn, tree, X)


def test_layers_keep_their_names():
    fn = of(attention)
    tree = adapted(fn, X)

    def names(fn, params):
        found = (name for name in op_names(fn, params, X) if "/lora/" not in name)
        return {re.sub(r"jit\(repeated\)/", "", name) for name in found}

    assert names(jaxlora.lora(fn), tree) >= names(fn, jaxlora.merge(tree))


def made_dense(params, x):
    for i in range(LAYERS):
        w = params[f"layer{i}"]
        x = norm(x @ jnp.sin(w["q"])) @ w["o"]
    return x


def made_dense_after(params, x):
    turned = []
    for i in range(LAYERS):
        w = params[f"layer{i}"]
        turned.append(w["q"].T)
        x = norm(x) @ w["o"]
    return sum(x @ jnp.sin(w) for w in turned)


@pytest.mark.parametrize("fn", [made_dense, made_dense_after])
def test_each_weight_that_is_made_dense_is_told_by_its_name(fn):
    tree = adapted(fn, X, names="qo")
    with pytest.warns(jaxlora.MaterializationWarning) as told:
        y = jax.jit(jaxlora.lora(fn))(tree, X)
    named = re.findall(r"'(\S+)' reaches", " ".join(str(warning.message) for warning in told))
    assert {*named} == {f"layer{i}/q" for i in range(LAYERS)}
    assert_allclose(y, fn(jaxlora.merge(tree), X), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="'layer0/q' reaches 'sin'"):
        jax.jit(jaxlora.lora(fn, strict=True))(tree, X)


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
@pytest.mark.parametrize("remat", [False, True], ids=["as it is", "rematerialized"])
def test_effects_of_layers_are_those_of_the_plain_ones(remat, ordered, capsys):
    if remat and ordered:
        pytest.skip("JAX has no ordered effects in what is rematerialized")

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
    assert [layer is None for _, layer in known.pieces(known.whole, lambda var: True)] == [
        False
    ] * LAYERS
