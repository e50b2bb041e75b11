"""Laws of layers that differ in what is not seen of one alone: they are not one function."""

import jax
import jax.numpy as jnp
import pytest
from cases.base import normal
from counts import equations, products
from jax.experimental.xla_metadata import set_xla_metadata
from layered import (
    LAYERS,
    X,
    adapted,
    assert_like_merged,
    attention,
    calls,
    moved,
    names_told,
    norm,
    of,
)
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.tracing.jaxprs import compat


def test_layers_that_differ_in_one_number_are_not_one_function():
    def fn(params, x):
        for i in range(LAYERS):
            w = params[f"layer{i}"]
            x = x + jnp.tanh(norm(x) @ w["q"] * (i + 1)) @ w["o"]
        return x

    tree = adapted(fn, X, names="qo")
    assert not calls(jaxlora.lora(fn), tree, X)
    assert_like_merged(fn, tree, X)


def test_layers_with_and_without_adapters_are_told_apart():
    fn = of(attention)
    tree = adapted(fn, X, layers=(0, 2, 4))
    assert calls(jaxlora.lora(fn), tree, X)
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
        assert_like_merged(fn, tree, X, strict=False)
    assert names_told(told) == {f"layer{i}/{name}" for i in range(LAYERS) for name in "qk"}


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
    assert names_told(told) == {f"layer{i}/q" for i in range(LAYERS)}
    assert_allclose(y, fn(jaxlora.merge(tree), X), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="'layer0/q' reaches 'sin'"):
        jax.jit(jaxlora.lora(fn, strict=True))(tree, X)


def widths_that_differ(params, x):
    for w in params["layers"]:
        gate, up = w["gate and up"]
        x = jnp.tanh(x + jnp.tanh(jnp.sin(norm(x) @ gate) * (norm(x) @ up)) @ w["o"])
    return x


def rows_that_differ(params, x):
    inputs = [x[:0], x, x[:2], x[:1], x[:3]]
    layers = zip(inputs, params["layers"], strict=True)
    return jnp.concatenate([jnp.tanh(norm(jnp.sin(x) @ w["o"].T)) for x, w in layers])


@pytest.mark.parametrize("fn", [widths_that_differ, rows_that_differ])
@pytest.mark.parametrize("widths", [[8, 6, 6, 6, 6], [6, 8, 8, 6, 6]], ids=str)
def test_layers_of_other_shapes_are_other_layers(fn, widths):
    names = ["gate and up", "o"] if fn is widths_that_differ else ["o"]
    shapes = [{"gate and up": (2, 8, width), "o": (width, 8)} for width in widths]
    if fn is rows_that_differ:
        shapes = [{"o": (8, 8)} for _ in widths]
    layers = [{name: normal(i, *of[name]) * 0.3 for name in names} for i, of in enumerate(shapes)]
    exclude = ("layers/0",) if fn is rows_that_differ else ()  # which is not used
    config = jaxlora.LoRAConfig(rank=2, exclude=exclude)
    assert_like_merged(fn, moved(fn, {"layers": layers}, X, config=config), X)


def test_what_a_layer_does_to_a_ref_is_done_once():
    def fn(params, x):
        count = jax.new_ref(jnp.zeros(()))
        turned = []
        for i in range(LAYERS):
            count[...] += 1.0
            x = attention(x, params[f"layer{i}"])
            turned.append(params[f"layer{i}"]["q"].T)  # which is a reason not to be one function
        return sum((x @ w for w in turned), count[...])

    tree = adapted(fn, X)
    assert_allclose(jax.jit(jaxlora.lora(fn))(tree, X), fn(jaxlora.merge(tree), X), rtol=1e-3)


def test_settings_of_the_first_operation_are_not_those_of_its_layer():
    def fn(params, x):
        for i in range(LAYERS):
            with set_xla_metadata(where="before"):
                x = jnp.sin(x)
            x = attention(x, params[f"layer{i}"])
        return x

    program = jax.make_jaxpr(jaxlora.lora(fn))(adapted(fn, X), X)
    for name, is_set in {"sin": True, "dot_general": False, compat.JIT[0]: False}.items():
        found = [*equations(program, name)]
        assert found
        assert {bool(eqn.ctx.xla_metadata) for eqn in found} == {is_set}


def test_weights_stay_two_in_a_function_of_a_layer():
    @jax.jit
    def selected(x, w, other):
        return jnp.tanh(norm(x) @ jax.lax.select(x[0, 0, 0] > 0, w, other))

    def fn(params, x):
        for i in range(LAYERS):
            w = params[f"layer{i}"]
            x = attention(x, w)
            for other in (w["q"].T.T, w["o"]):
                x = x + selected(x, w["q"], other)
        return x

    tree = adapted(fn, X)
    with pytest.warns(jaxlora.MaterializationWarning) as told:
        jax.jit(jaxlora.lora(fn))(tree, X)
    assert names_told(told) == {f"layer{i}/{name}" for i in range(LAYERS) for name in "qo"}


def test_functions_that_call_others_twice_are_compared_once():
    f = jax.jit(lambda x, w: jnp.sin(x @ w))
    for _ in range(40):  # a trillion calls, written out
        f = jax.jit(lambda x, w, f=f: f(f(x, w) * 0.5, w))

    def fn(params, x):
        return f(x, params["w"])

    params = {"w": normal(1, 8, 8) * 0.1}
    tree = jax.eval_shape(
        lambda: moved(lambda p, x: x @ p["w"], params, X, config=jaxlora.LoRAConfig(rank=2))
    )
    assert jax.eval_shape(jaxlora.lora(fn), tree, X).shape == X.shape
