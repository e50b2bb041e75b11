"""The functions on trees, given NNX modules: adapted ones, those that hold one, and plain ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from modules import CASES, CONFIG, Case, Network, Sequential, X

import jaxlora
import jaxlora.nnx

pytestmark = pytest.mark.once


def size(state):
    return sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("case", [*CASES, Case(Network, X)], ids=lambda case: case.make.__name__)
def test_summary_counts_parameters(case):
    plain = nnx.jit(case.make)(nnx.Rngs(0))
    base = size(nnx.state(plain, nnx.Param))
    assert (jaxlora.summary(plain).trainable, jaxlora.summary(plain).total) == (0, base)
    adapted = case.adapted()
    factors = size(nnx.state(adapted, nnx.Param))
    for tree in (adapted, adapted.params(), {"model": adapted}):
        found = jaxlora.summary(tree)
        assert (found.trainable, found.total) == (factors, base + factors)
        assert (found.trainable_bytes, found.total_bytes) == (4 * factors, 4 * (base + factors))
    rows = {row.path: row for row in jaxlora.summary(adapted).rows}
    assert {path for path, row in rows.items() if row.rank} == set(adapted.factors)


def test_summary_counts_what_stands_inside_a_larger_module(key):
    outer = Sequential()
    base = size(nnx.state(outer, nnx.Param))
    outer.up = jaxlora.nnx.adapt(key, outer.up, X, config=CONFIG)
    found = jaxlora.summary(outer)
    assert (found.trainable, found.total) == (2 * (4 + 8), base + 2 * (4 + 8))
    assert [row.path for row in found.rows] == ["down/bias", "down/kernel", "up/bias", "up/kernel"]


def test_summary_counts_leaves_trained_whole_and_no_keys(key):
    config = jaxlora.LoRAConfig(rank=1, targets=("first/kernel",), train=("norm/mean",))
    model = Network(nnx.Rngs(0))
    model.eval()
    found = jaxlora.summary(jaxlora.nnx.adapt(key, model, X, config=config))
    rows = {row.path: (row.trainable, row.total) for row in found.rows}
    assert rows["norm/mean"] == (8, 16)
    assert not {"norm/var", "dropout/rngs/count", "dropout/rngs/key"} & set(rows)
    assert jaxlora.summary({"w": jnp.ones(3), "key": key}).total == 3


MISTAKES = {
    "merge": (lambda m, a: jaxlora.merge(m), "jaxlora.nnx.merge"),
    "unmerge": (lambda m, a: jaxlora.unmerge(m, a), "jaxlora.nnx.merge"),
    "split": (lambda m, a: jaxlora.split(m), "adapted.adapters()"),
    "bind": (lambda m, a: jaxlora.bind(m, a), "jaxlora.nnx.Adapted(adapted.model, adapters)"),
    "mask": (lambda m, a: jaxlora.mask(m), "flax.nnx.Param"),
    "freeze": (lambda m, a: jaxlora.freeze(m), "flax.nnx.Optimizer"),
    "dropout": (lambda m, a: jaxlora.dropout(m, jax.random.key(0), 0.1), "dropout_rate"),
    "save_merged": (lambda m, a: jaxlora.save_merged("nowhere", m), "adapted.params()"),
    "save_adapters": (lambda m, a: jaxlora.save_adapters("nowhere", m), "adapted.adapters()"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_adapted_module_in_the_place_of_a_tree_is_refused(name, key):
    call, advice = MISTAKES[name]
    adapted: Any = jaxlora.nnx.adapt(key, Sequential(), X, config=CONFIG)
    outer = nnx.Dict(inner=adapted)
    for module, told in ((adapted, "is a jaxlora.nnx.Adapted"), (outer, "holds a jaxlora.nnx.Ada")):
        with pytest.raises(TypeError, match=told) as raised:
            call(module, adapted.adapters())
        assert advice in str(raised.value)


@pytest.mark.parametrize("name", ["merge", "split", "dropout", "save_merged"])
def test_plain_module_is_told_how_to_be_adapted(name):
    call, _ = MISTAKES[name]
    with pytest.raises(ValueError, match="adapt the Sequential with jaxlora"):
        call(Sequential(), None)


def test_module_is_a_tree_like_any_other(key):
    model = Sequential()
    params = jaxlora.init(key, lambda model, x: model(x), model, X, config=CONFIG)
    base, adapters = jaxlora.split(params)
    merged = jaxlora.merge(jaxlora.bind(base, adapters))
    assert type(merged) is Sequential
    np.testing.assert_allclose(merged(X), model(X), rtol=1e-5, atol=1e-6)
    tx = jaxlora.freeze(optax.sgd(1.0))
    updates: Any = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]
    assert float(updates.up.bias[...].max()) == 0
