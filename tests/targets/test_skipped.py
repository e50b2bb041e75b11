"""Weights that targets leave out are told of; one that no rule covers runs dense where it is named.

The oracle is the plain program on the merged weights, in values and gradients.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from flax import linen as nn
from flax import nnx
from flax.linen import fp8_ops

import jaxlora
from jaxlora.reports import Kind
from jaxlora.targets.patterns import ends_in

pytestmark = pytest.mark.once

X = normal(9, 3, 4)


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@jax.custom_vjp
def rounded(w):
    return jnp.round(w * 8) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


def straight_through(w):
    return w + jax.lax.stop_gradient(jnp.round(w * 8) / 8 - w)


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (product(x, w), None), x, params["w"])[0]


def unrolled(params, x):
    for i in range(3):
        x = product(x, params["w"][i])
    return x


class Fp8(nn.Module):
    product: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, dot_general_cls=self.product)(x)


SQUARE, STACK = {"w": normal(0, 4, 4)}, {"w": normal(0, 3, 4, 4)}
DENSE = {
    "inside a custom_vjp": (lambda p, x: product(x, p["w"]), SQUARE),
    "rounded by a custom_vjp": (lambda p, x: x @ rounded(p["w"]), SQUARE),
    "rounded straight through": (lambda p, x: x @ straight_through(p["w"]), SQUARE),
    "elementwise": (lambda p, x: x @ jnp.tanh(p["w"]), SQUARE),
    "elementwise of a custom_jvp": (lambda p, x: x @ jax.nn.relu(p["w"]), SQUARE),
    "added": (lambda p, x: jnp.tanh(x + p["w"]), {"w": normal(0, 3, 4)}),
    "under jit": (lambda p, x: jax.jit(product)(x, p["w"]), SQUARE),
    "scanned": (scanned, STACK),
    "unrolled": (unrolled, STACK),
    "of three axes": (
        lambda p, x: jnp.einsum("ti,iho->tho", x, jnp.exp(p["w"])),
        STACK | {"w": normal(0, 4, 2, 3)},
    ),
}


def init(fn, params, *args, **config):
    config = jaxlora.LoRAConfig(**{"rank": 2, "alpha": 4, **config})
    return jaxlora.init(jax.random.key(0), fn, params, *args or (X,), config=config)


def said(fn, params, *args, **config):
    """Return the one warning that init gives, without its last line; the lines below the first."""
    with pytest.warns(jaxlora.SkippedWeightWarning) as caught:
        init(fn, params, *args, **config)
    (warning,) = caught
    assert warning.filename == __file__
    return [line.strip() for line in str(warning.message).splitlines()[1:-1]]


def trained(adapted):
    base, adapters = jaxlora.split(adapted)
    return base, jax.tree.map(lambda x: x + normal(x.size, *x.shape), adapters)


@pytest.mark.parametrize("name", DENSE)
def test_named_weight_without_a_rule_runs_dense(name):
    fn, params = DENSE[name]
    adapted = init(fn, params, targets=("w",))
    base, adapters = trained(adapted)
    low_rank = jaxlora.lora(fn)

    def loss(adapters, call):
        return jnp.sum(jnp.sin(call(jaxlora.bind(base, adapters))))

    def merged(params):
        weight = params["w"]
        return fn(params | {"w": weight.base + weight.delta()}, X)

    wanted = jax.value_and_grad(loss)(adapters, merged)

    def traced(adapters):
        return jax.value_and_grad(loss)(adapters, lambda params: low_rank(params, X))

    with pytest.warns(jaxlora.MaterializationWarning, match="'w' reaches"):
        found = [how(adapters) for how in (traced, jax.jit(traced))]
    for got in found:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-5), got, wanted)
    with pytest.raises(ValueError, match="strict=True needs a low-rank rule"):
        jaxlora.lora(fn, strict=True)(adapted, X)
    assert "w" in jaxlora.explain(fn, adapted, X).materialized


@pytest.mark.parametrize("name", DENSE)
def test_all_linear_tells_of_weights_without_a_rule(name):
    fn, params = DENSE[name]
    params = params | {"head": normal(1, 4, 4)}

    def model(params, x):
        return fn(params, x @ params["head"])

    (line,) = said(model, params)
    assert line.startswith("w (")
    assert "no low-rank rule covers" in line


def test_roles_of_a_dense_weight_are_those_of_a_stack_of_kernels():
    def roles(name):
        fn, params = DENSE[name]
        return jaxlora.find_sites(fn, params, X)["w"].roles

    assert roles("elementwise") == jaxlora.weights.Roles((), (0,), (1,))
    assert roles("of three axes") == jaxlora.weights.Roles((), (0, 1), (2,))
    assert roles("scanned") == roles("unrolled") == jaxlora.weights.Roles((0,), (1,), (2,))


@pytest.mark.parametrize("name", ["Fp8DotGeneralOp", "Fp8DirectDotGeneralOp"])
@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")
def test_fp8_layer_is_adapted_by_name(name):
    x, model = normal(1, 16, 32), Fp8(getattr(fp8_ops, name))
    with jax.numpy_dtype_promotion("standard"):  # the layer itself needs it
        variables = model.init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="nothing to adapt"):
            init(model.apply, variables, x)
        adapted = init(model.apply, variables, x, targets=("Dense_0",))
        base, adapters = trained(adapted)
        assert list(adapters) == ["params/Dense_0/kernel"]
        params = jaxlora.bind(base, adapters)
        with pytest.warns(jaxlora.MaterializationWarning, match="custom_vjp_call"):
            got: Any = jaxlora.lora(model.apply)(params, x)
        wanted: Any = model.apply(jaxlora.merge(params), x)
        np.testing.assert_allclose(got, wanted, 1e-5, 1e-5 * np.abs(wanted).max())


def everything(params, x):
    for name in sorted(params["blocks"]):
        x = x @ params["blocks"][name]["w"] @ jnp.tanh(params["blocks"][name]["gate"])
    x = jax.lax.scan(
        lambda x, p: (x @ p["w"] * p["scale"][None] + p["bias"][None], None), x, params["scan"]
    )[0]
    x = x + params["embed"][jnp.arange(3)] + params["bias"][:3] + params["gamma"]
    return x @ params["embed"].T @ params["narrow"], params["returned"][1:]


EVERYTHING = {
    "blocks": {
        f"block_{i}": {"w": jnp.eye(4), "gate": jnp.eye(4), "scale": jnp.ones(4)} for i in range(12)
    },
    "scan": {"w": normal(0, 2, 4, 4), "scale": jnp.ones((2, 4)), "bias": jnp.ones((2, 4))},
    "embed": normal(1, 9, 4),
    "bias": normal(2, 3, 4),
    "gamma": jnp.ones((1, 4)),
    "narrow": normal(3, 9, 1),
    "returned": normal(4, 4, 4),
    "unused": normal(5, 4, 4),
    "count": jnp.ones((4, 4), jnp.int32),
}
GATES = (
    "blocks/block_{0..11}/gate (4, 4) x12: reaches tanh, which no low-rank rule covers: "
    "by name it runs dense"
)


def test_all_linear_names_each_weight_once_and_why():
    assert said(everything, EVERYTHING) == [
        GATES,
        "embed (9, 4): it is looked up",
        "narrow (9, 1): its smaller side, 1, is below the rank",
        "returned (4, 4): the program returns it and consumes it nowhere",
        "unused (4, 4): the program does not use it",
    ]


def test_exclude_and_what_is_trained_otherwise_are_not_left_out():
    rest = {"exclude": ("returned", "unused"), "rows": {"embed": [0]}, "train": ("narrow",)}
    assert said(everything, EVERYTHING, **rest) == [GATES]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init(everything, EVERYTHING, **rest | {"exclude": ("returned", "unused", "gate")})
        init(everything, EVERYTHING, targets=("w",))
        init(everything, EVERYTHING, targets=("w", "gate"), rank=1)
        adapted = init(everything, EVERYTHING, targets=("blocks",), train=("gate",))
        assert isinstance(adapted["blocks"]["block_0"]["gate"], jaxlora.weights.TrainedLeaf)


def test_names_tell_of_what_they_match_alone():
    assert said(everything, EVERYTHING, targets=("blocks",)) == [GATES]
    assert said(everything, EVERYTHING, targets=("block_3", "embed")) == [
        GATES.replace("{0..11}", "3").replace(" x12", "")
    ]


def test_layers_tell_of_those_layers_alone():
    (line,) = said(everything, EVERYTHING, layers=[1])
    assert line.startswith("blocks/block_1/gate (4, 4): reaches tanh")


def test_all_linear_may_stand_beside_names():
    exclude = ("gate", "unused", "returned", "narrow")
    adapted = init(everything, EVERYTHING, targets=("all-linear", "embed"), exclude=exclude)
    every = [f"blocks/block_{i}/w" for i in sorted(range(12), key=str)]
    assert list(jaxlora.split(adapted)[1]) == [*every, "embed", "scan/w"]
    cut = init(
        everything, EVERYTHING, targets=("all-linear", "scan/w[:1]"), exclude=(*exclude, "embed")
    )
    assert list(jaxlora.split(cut)[1]) == [*every, "scan/w[0:1, :, :]"]


def test_entries_picked_from_a_stack_are_no_lookup():
    roles = jaxlora.weights.Roles((0,), (1,), (2,))
    picked = jaxlora.reports.Use("w", "gather", "", Kind.LOOKED_UP, in_=frozenset({0}))
    product = jaxlora.reports.Use(
        "w", "dot_general", "", Kind.CONTRACTED, frozenset({0}), frozenset({1})
    )
    experts = jaxlora.targets.Site("w", (2, 4, 4), jnp.float32, roles, (picked, product))
    assert not experts.is_looked_up
    rows = jaxlora.weights.Roles((), (0,), (1, 2))
    assert jaxlora.targets.Site("w", (2, 4, 4), jnp.float32, rows, (picked, product)).is_looked_up


def test_quantize_is_silent_of_what_it_leaves_as_it_is():
    nf4 = jaxlora.QuantizationConfig("int8", 4, double=False)
    found = jaxlora.quantize(everything, EVERYTHING, X, config=nf4)
    assert isinstance(found["scan"]["w"], jaxlora.weights.QuantizedWeight)
    assert not isinstance(found["embed"], jaxlora.weights.QuantizedWeight)


def test_name_of_a_module_is_not_that_of_its_weights():
    assert ends_in("a/query/kernel", "query/kernel")
    assert ends_in("a/w", "w[:, :2]")
    assert not ends_in("a/query/kernel", "query")


def test_states_of_flax_are_no_weights():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.perturb("moved", x)
            return nn.Dense(4)(x + self.variable("cache", "last", jnp.zeros, x.shape).value)

    variables = Model().init(jax.random.key(0), X)
    assert set(variables) == {"params", "cache", "perturbations"}
    adapted = init(Model().apply, variables, X)
    assert list(jaxlora.split(adapted)[1]) == ["params/Dense_0/kernel"]
    module: Any = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    module.last, module.table = nnx.Cache(jnp.zeros((3, 4))), nnx.Param(jnp.zeros((3, 4)))
    state = nnx.state(module)
    graphdef = nnx.graphdef(module)

    def call(state, x):
        module = nnx.merge(graphdef, state)
        return module(x + module.last[...] + module.table[...])

    assert [line.split()[0] for line in said(call, state)] == ["table"]
    assert list(jaxlora.find_sites(call, state, X).dense) == ["table"]
