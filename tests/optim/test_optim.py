"""Optimizers that treat each factor in its own way, against NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
import jaxlora.nnx
from jaxlora import optim

pytestmark = pytest.mark.once

X = normal(0, 3, 5, 8)
PARAMS = {
    "w": normal(1, 3, 8, 6),
    "qkv": normal(2, 6, 12),
    "bias": normal(3, 12),
    "b": normal(4, 12),
}


def model(params, x):
    y = jnp.einsum("etd,edf->etf", x, params["w"])
    return jnp.tanh(y @ params["qkv"] + params["bias"][None, None] + params["b"][None, None])


def adapted(seed=10) -> Any:
    """Return a tree with a stack, parts, and leaves of other names, no factor of it zero."""
    targets = ("w", "qkv[:, 0:4]", "qkv[:, 4:12]")
    config = jaxlora.LoRAConfig(rank=2, targets=targets)
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), model, PARAMS, X, config=config))
    return jaxlora.bind(base, drawn(adapters, seed))


def drawn(tree, seed) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([normal(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def through_adapters(tx, params, gradients) -> Any:
    """Return the updates of a transform for adapters alone."""
    adapters, of = jaxlora.split(params)[1], jaxlora.split(gradients)[1]
    return tx.update(of, tx.init(adapters), adapters)[0]


def through_tree(tx, params, gradients) -> Any:
    """Return those for the whole tree; what is not a factor has to stay."""
    tx = jaxlora.freeze(tx)
    updates, _ = tx.update(gradients, tx.init(params), params)
    plain, adapters = jaxlora.split(updates)
    assert all(not leaf.any() for leaf in jax.tree.leaves(plain))
    return adapters


both_ways = pytest.mark.parametrize("through", [through_adapters, through_tree])


@both_ways
def test_rates_are_multiples(through):
    params = adapted()
    gradients = adapted(50)
    updates = through(optim.scale_rates(a=0.5, b=16), params, gradients)
    for path, adapter in jaxlora.split(gradients)[1].items():
        assert_array_equal(updates[path].a, 0.5 * adapter.a)
        assert_array_equal(updates[path].b, 16 * adapter.b)


@both_ways
def test_decay_adds_multiples_of_the_factors(through):
    params = adapted()
    gradients = adapted(50)
    updates = through(optim.decay_factors(b=0.25), params, gradients)
    adapters = jaxlora.split(params)[1]
    for path, adapter in jaxlora.split(gradients)[1].items():
        assert_array_equal(updates[path].a, adapter.a)
        assert_allclose(updates[path].b, adapter.b + 0.25 * adapters[path].b, rtol=1e-6)


def flat(x, shape):
    return np.asarray(x, np.float64).reshape(shape)


@both_ways
def test_preconditioner_is_the_inverse_of_the_other_factors_gram_matrix(through):
    params = adapted()
    gradients = adapted(50)
    updates = through(optim.precondition(damping=0.1), params, gradients)
    adapters, found = jaxlora.split(params)[1], jaxlora.split(gradients)[1]
    for path, adapter in adapters.items():
        stack = 3 if path == "w" else 1
        a, da = (flat(x.a, (stack, -1, 2)) for x in (adapter, found[path]))
        b, db = (flat(x.b, (stack, 2, -1)) for x in (adapter, found[path]))
        wanted = da @ np.linalg.inv(b @ b.transpose(0, 2, 1) + 0.1 * np.eye(2))
        assert_allclose(flat(updates[path].a, wanted.shape), wanted, rtol=2e-4, atol=1e-5)
        wanted = np.linalg.inv(a.transpose(0, 2, 1) @ a + 0.1 * np.eye(2)) @ db
        assert_allclose(flat(updates[path].b, wanted.shape), wanted, rtol=2e-4, atol=1e-5)


def test_preconditioned_step_of_the_product_is_that_of_any_factors_of_it():
    def linear(params, x):
        return x @ params["w"]

    config = jaxlora.LoRAConfig(rank=2)
    node = jaxlora.init(jax.random.key(0), linear, {"w": normal(0, 8, 6)}, X[0], config=config)["w"]
    term = dataclasses.replace(node.term, a=normal(1, 8, 2), b=normal(2, 2, 6))
    turn = jnp.array([[1.5, 0.5], [-1.0, 2.0]])
    other = dataclasses.replace(term, a=term.a @ turn, b=jnp.linalg.inv(turn) @ term.b)
    tx, steps = optim.precondition(damping=1e-7), []
    for factors in (term, other):
        adapters = {"w": dataclasses.replace(node, terms=(factors,))}
        gradients = jax.grad(lambda p: jnp.sum(jnp.tanh(jaxlora.lora(linear)(p, X[0]))))(adapters)
        updates: Any = tx.update(gradients, tx.init(adapters), adapters)[0]
        a, b = adapters["w"].a, adapters["w"].b
        steps.append(updates["w"].a @ b + a @ updates["w"].b)
    assert_allclose(*steps, rtol=1e-3, atol=1e-4)


def test_factors_of_an_nnx_module_have_their_own_rates():
    module = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    module = jaxlora.nnx.adapt(nnx.Rngs(1), module, X[0], config=jaxlora.LoRAConfig(rank=2))
    before = module.adapters()["kernel"]
    tx = optax.chain(optax.sgd(1.0), optim.scale_rates(a=0.5, b=16))
    optimizer = nnx.Optimizer(module, tx, wrt=jaxlora.nnx.Factor)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(module, jaxlora.nnx.Factor))
    optimizer.update(module, gradients)
    after = module.adapters()["kernel"]
    assert_allclose(before.a - after.a, 0.5, rtol=1e-5)
    assert_allclose(before.b - after.b, 16, rtol=1e-5)


@both_ways
def test_factors_that_are_not_named_stay(through):
    params = adapted()
    tx = jaxlora.freeze(optax.adamw(1e-2), train=("b",))
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        updates = through(tx, params, adapted(50))
    for adapter in updates.values():
        assert not adapter.a.any()
        assert adapter.b.all()
    trained = sum(adapter.b.size for adapter in jaxlora.split(params)[1].values())
    assert sum(leaf.size for leaf in jax.tree.leaves(tx.init(params))) == 2 * trained + 1


def test_gradient_of_a_frozen_factor_is_not_computed(compiled):
    def model(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return x

    params, x = {"layers": [normal(i, 64, 64) for i in range(6)]}, normal(9, 2048, 64)
    config = jaxlora.LoRAConfig(rank=2)
    base, adapters = jaxlora.split(jaxlora.init(jax.random.key(0), model, params, x, config=config))

    def products(**options):
        tx = jaxlora.freeze(optax.sgd(0.1), **options)

        def step(adapters, base, x):
            def loss(adapters):
                return jnp.sum(jaxlora.lora(model)(jaxlora.bind(base, adapters), x))

            updates, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters), adapters)
            return optax.apply_updates(adapters, updates)

        return compiled(step, adapters, base, x).as_text().count(" dot(")

    both, second = products(), products(train=("b",))
    assert both - second >= 6  # for each weight at least one


@pytest.mark.parametrize("train", [(), ("c",), "ab"])
def test_names_of_no_factor_are_refused(train):
    with pytest.raises(ValueError, match="train must name some of"):
        jaxlora.freeze(optax.sgd(1.0), train=train)


def test_factors_of_an_nnx_module_are_frozen_too():
    module = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    module = jaxlora.nnx.adapt(nnx.Rngs(1), module, X[0], config=jaxlora.LoRAConfig(rank=2))
    before = module.adapters()["kernel"]
    tx = jaxlora.freeze(optax.sgd(1.0), train="b")
    optimizer = nnx.Optimizer(module, tx, wrt=jaxlora.nnx.Factor)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(module, jaxlora.nnx.Factor))
    optimizer.update(module, gradients)
    after = module.adapters()["kernel"]
    assert_array_equal(before.a, after.a)
    assert_allclose(before.b - after.b, 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.scale_rates(b=0.0), "b must be finite and positive: got 0.0"),
        (
            lambda: optim.scale_rates(a=float("inf")),
            "a must be finite and positive: got inf",
        ),
        (
            lambda: optim.decay_factors(a=-0.1),
            "a must be finite and not negative: got -0.1",
        ),
        (lambda: optim.precondition(0.0), "damping must be finite and positive: got 0.0"),
    ],
)
def test_number_out_of_its_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [optim.scale_rates, optim.decay_factors, optim.precondition])
def test_tree_without_factors_is_refused(make):
    with pytest.raises(ValueError, match="has no factors to train"):
        make().init(PARAMS)


@pytest.mark.parametrize("make", [optim.decay_factors, optim.precondition])
def test_update_without_the_factors_is_refused(make):
    adapters = jaxlora.split(adapted())[1]
    with pytest.raises(ValueError, match="the factors themselves are needed"):
        make().update(adapters, optax.EmptyState())


def test_preconditioner_of_an_nnx_module_is_refused():
    module = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    module = jaxlora.nnx.adapt(nnx.Rngs(1), module, X[0], config=jaxlora.LoRAConfig(rank=2))
    with pytest.raises(TypeError, match="needs Adapters or LoRAWeights"):
        optim.precondition().init(nnx.state(module, jaxlora.nnx.Factor))


def test_preconditioner_of_one_factor_is_refused():
    tx = jaxlora.freeze(optim.precondition(), train=("b",))
    with pytest.raises(TypeError, match="precondition needs both factors"):
        tx.init(jaxlora.split(adapted())[1])
