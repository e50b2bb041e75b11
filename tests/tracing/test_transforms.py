"""Transforms of JAX around an adapted function and inside of it, against merged weights."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Case, normal
from counts import op_names, products
from jax import lax
from jax.experimental import io_callback
from mlp import WEIGHTS, X, close, gradients, mlp, of_adapters, trained

import jaxlora


@pytest.fixture
def params(key):
    return trained(key)


def hessian_product(f):  # in reverse over reverse
    slope = jax.grad(lambda p: jnp.sum(jnp.sin(f(p))))
    return jax.grad(lambda p: optax.tree.vdot(slope(p), p))


def value_and_grad(f):
    return jax.value_and_grad(lambda p: (jnp.sum(f(p) ** 2), {"logits": f(p)}), has_aux=True)


DERIVATIVES = {
    "jvp": lambda f: lambda p: jax.jvp(f, (p,), (p,)),
    "vjp": lambda f: lambda p: jax.vjp(f, p)[1](jnp.ones((5, 8))),
    "value_and_grad": value_and_grad,
    "hessian_product": hessian_product,
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivative_equals_that_of_merged_weights(params, name):
    base, adapters = jaxlora.split(params)
    low_rank, merged = (DERIVATIVES[name](f) for f in of_adapters(mlp, base))
    wanted = jax.jit(merged)(adapters)
    assert any(x.any() for x in jax.tree.leaves(wanted))
    close(jax.jit(low_rank)(adapters), wanted)


@pytest.mark.parametrize("whole_tree", [False, True])
def test_donated_weights_and_optimizer_state_are_reused(params, whole_tree):
    base, adapters = jaxlora.split(params)
    sgd = optax.sgd(0.1, momentum=0.9)
    tx, trained = (jaxlora.freeze(sgd), params) if whole_tree else (sgd, adapters)

    def loss(trained):
        whole = trained if whole_tree else jaxlora.bind(base, trained)
        return jnp.sum(jaxlora.lora(mlp)(whole, X) ** 2)

    def step(trained, state):
        updates, state = tx.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    given = trained, jax.jit(tx.init)(trained)
    wanted, given = jax.jit(step)(*given), jax.tree.map(jnp.copy, given)
    donating: Any = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(given))
    assert donating.memory_analysis().alias_size_in_bytes == size
    close(donating(*given), wanted)
    assert all(x.is_deleted() for x in jax.tree.leaves(given))


@pytest.fixture
def many(params):
    """Return the tree with three times the factors over one base, and the axes to map over."""
    mask = jaxlora.mask(params)
    stack = jax.tree.map(lambda yes, x: jnp.stack([0 * x, x, 2 * x]) if yes else x, mask, params)
    return stack, jax.tree.map(lambda yes: 0 if yes else None, mask)


def test_each_of_many_adapters_is_what_it_is_alone(params, many):
    stacked, axes = many
    got = jax.vmap(jaxlora.lora(mlp), in_axes=(axes, None))(stacked, X)
    base, adapters = jaxlora.split(params)
    for i in range(3):
        one = jaxlora.bind(base, jax.tree.map(lambda x, i=i: i * x, adapters))
        close(got[i], mlp(jaxlora.merge(one), X))


def test_base_is_multiplied_once_for_many_adapters(many, compiled):
    stacked, axes = many
    fn = jax.vmap(jaxlora.lora(mlp), in_axes=(axes, None))
    for weight in WEIGHTS.values():
        assert sum(weight.shape in shapes for shapes in products(fn, stacked, X)) == 1
    text = compiled(fn, stacked, X).as_text()
    sizes = [np.prod([*map(int, s.split(","))]) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) < 3 * WEIGHTS["up"].size  # and there is no base for each adapter


def llama(params, tokens):
    def norm(x, scale):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    def block(x, layer):
        h, heads = norm(x, layer["norm_1"]), (*x.shape[:2], 8, -1, 128)
        q, k, v = ((h @ layer[name]).reshape(heads) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("btkgh,bskoh->bkgts", q, k))
        x = x + jnp.einsum("bkgts,bskoh->btkgh", weights, v).reshape(x.shape) @ layer["out"]
        h = norm(x, layer["norm_2"])
        return x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"], None

    x, _ = lax.scan(block, params["embed"][tokens], params["layers"])
    return norm(x, params["norm"]) @ params["head"]


def test_sites_and_factors_of_a_model_of_70_billion_parameters(key):
    d, hidden, words = 8192, 28672, 128256
    sizes = {"query": (d, d), "key": (d, 1024), "value": (d, 1024), "out": (d, d)}
    sizes |= {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    layers = {name: array((80, *size)) for name, size in sizes.items()}
    layers |= {"norm_1": array((80, d)), "norm_2": array((80, d))}
    params = {"embed": array((words, d)), "head": array((d, words)), "norm": array((d,))}
    args = {**params, "layers": layers}, jax.ShapeDtypeStruct((1, 128), jnp.int32)
    stack, single = jaxlora.weights.Roles((0,), (1,), (2,)), jaxlora.weights.Roles((), (0,), (1,))
    wanted: Any = {f"layers/{name}": stack for name in sizes} | {"embed": single, "head": single}
    assert {site.path: site.roles for site in jaxlora.find_sites(llama, *args)} == wanted
    init = functools.partial(jaxlora.init, key, llama, config=jaxlora.LoRAConfig(rank=16))
    with pytest.warns(jaxlora.SkippedWeightWarning, match=r"embed .*: it is looked up"):
        adapted = jax.eval_shape(init, *args)
    base, adapters = jaxlora.split(adapted)
    assert jaxlora.summary(base).total > 69e9
    wanted = {f"layers/{name}": ((80, i, 16), (80, 16, o)) for name, (i, o) in sizes.items()}
    wanted |= {"head": ((d, 16), (16, words))}
    assert {path: (x.a.shape, x.b.shape) for path, x in adapters.items()} == wanted
    out = jax.eval_shape(jaxlora.lora(llama, strict=True), adapted, args[1])
    assert (out.shape, out.dtype) == ((1, 128, words), jnp.bfloat16)


steep = jax.custom_vjp(lambda x: jnp.tanh(x))
steep.defvjp(lambda x: (jnp.tanh(x), None), lambda _, g: (7.0 * g,))
steep_gradient = jax.custom_gradient(lambda x: (jnp.tanh(x), lambda g: (7.0 * g,)))
steep_product = jax.custom_vjp(lambda x, w: x @ w)
steep_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (7 * g @ r[1].T, 7 * r[0].T @ g))


@pytest.mark.parametrize("steep", [steep, steep_gradient, jax.jit(steep)])
def test_backward_rule_of_what_takes_no_weight_is_kept(params, steep):
    base, adapters = jaxlora.split(params)
    fn = jaxlora.lora(lambda params, x: jnp.sum(steep(x @ params["up"])), strict=True)
    linear = jax.grad(lambda a: 7.0 * jnp.sum(X @ jaxlora.merge(jaxlora.bind(base, a))["up"]))
    close(jax.grad(lambda a: fn(jaxlora.bind(base, a), X))(adapters), linear(adapters))


def test_backward_rule_of_what_takes_a_weight_is_kept_and_the_weight_told(key):
    def fn(params, x):
        return x @ params["w"] + steep_product(x, params["w"])

    params = Case(fn, {"w": normal(0, 8, 6)}, (X,)).trained(key)
    with pytest.warns(jaxlora.MaterializationWarning, match="'w' reaches 'custom_vjp_call'"):
        y, got, wanted = jaxlora.lora(fn)(params, X), *gradients(fn, params)
    close((y, got), (fn(jaxlora.merge(params), X), wanted))
    without_rule, _ = gradients(lambda params, x: 2.0 * x @ params["w"], params)
    close(got, jax.tree.map(lambda g: 4.0 * g, without_rule))  # 1 + 7 of what would be 1 + 1
    with pytest.raises(ValueError, match="'w' reaches 'custom_vjp_call'"):
        jaxlora.lora(fn, strict=True)(params, X)


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_callbacks_run_once_and_in_order(params, compile):
    log = []

    def tell(name, x):
        log.append(name)
        return np.asarray(x)

    def told(name, x):
        jax.debug.callback(lambda x: log.append(name), x, ordered=True)
        return x

    def fn(params, x):
        x, _ = lax.scan(lambda x, _: (mlp(params, told("layer", x)), None), x, length=2)
        x = io_callback(functools.partial(tell, "io"), x, x, ordered=True)
        return told("end", jax.pure_callback(functools.partial(tell, "pure"), x, x))

    got = compile(jaxlora.lora(fn))(params, X)
    jax.effects_barrier()
    assert log == ["layer", "layer", "io", "pure", "end"]
    close(got, fn(jaxlora.merge(params), X))


@pytest.mark.parametrize("inside", [True, False])
def test_policy_keeps_the_rank_sized_products(params, inside):
    base, adapters = jaxlora.split(params)

    def made(policy):
        remat = functools.partial(jax.checkpoint, policy=policy)
        fn = jaxlora.lora(remat(mlp)) if inside else remat(jaxlora.lora(mlp))
        grad = jax.grad(lambda a: jnp.sum(jnp.sin(fn(jaxlora.bind(base, a), X))))
        close(grad(adapters), gradients(mlp, params)[1])
        return sum(sorted(result) == [2, 5] for *_, result in products(grad, adapters))

    kept = made(jax.checkpoint_policies.save_only_these_names("lora"))
    remade = made(jax.checkpoint_policies.nothing_saveable)
    assert (kept, remade) == (4, 6)  # for each weight one forward, one back, one more forward
    assert made(None) == (4 if inside else 6)  # one inside without a policy keeps them


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["dots_saveable", "dots_with_no_batch_dims_saveable"])
def test_policy_that_keeps_products_keeps_those_of_the_base_alone(params, name, inside):
    """The products with factors have the size of an activation too, and are made again."""
    base, adapters = jaxlora.split(params)
    remat = functools.partial(jax.checkpoint, policy=getattr(jax.checkpoint_policies, name))
    lora = functools.partial(jaxlora.lora, form="factored")
    fn = lora(remat(mlp)) if inside else remat(lora(mlp))

    def kept(fn, *args):
        _, backward = jax.vjp(lambda *args: jnp.sum(jnp.sin(fn(*args))), *args)
        held = [leaf.shape for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")]
        return sorted(shape for shape in held if shape[:1] == X.shape[:1])

    ours = kept(lambda adapters, x: fn(jaxlora.bind(base, adapters), x), adapters, X)
    assert ours == kept(remat(mlp), jaxlora.merge(params), X)


def test_error_of_the_users_function_keeps_its_traceback(params):
    def layer(x, _):
        return x @ jnp.ones((7, 8)), None

    def fn(params, x):
        return lax.scan(layer, mlp(params, x), None, length=2)

    with pytest.raises(TypeError, match="contracting dimensions") as raised:
        jax.jit(jaxlora.lora(fn))(params, X)
    lines = {entry.name: str(entry.statement) for entry in raised.traceback}
    assert "lax.scan(layer" in lines["fn"]
    assert "x @ jnp.ones((7, 8))" in lines["layer"]


def test_scopes_hold_the_products_of_their_layer(params):
    grad = jax.grad(lambda params: jnp.sum(jnp.sin(jaxlora.lora(mlp)(params, X))))

    def scopes(fn, *args):
        names = (name for name in op_names(fn, *args) if name.endswith("/dot_general"))
        return {re.sub("/lora/.*", "/lora", name.removesuffix("/dot_general")) for name in names}

    layers = {"block/up", "block/down"}
    assert scopes(jaxlora.lora(mlp), params, X) == layers | {f"{name}/lora" for name in layers}
    forward = {f"jvp({name}){rest}" for name in layers for rest in ("", "/lora")}
    backward = {f"transpose(jvp({name}))/lora" for name in layers}
    through_base = {"transpose(jvp(block/down))"}  # to the input; bases get no gradient
    assert scopes(grad, params) == forward | backward | through_base
