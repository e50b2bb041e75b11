"""What trains NNX modules by the types of variables trains the factors, and nothing else."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from modules import CASES, CONFIG, Case, Network, Sequential, X, close, copied, normal, pretrained

import jaxlora
import jaxlora.nnx
from jaxlora.nnx import Factor, Frozen, adapt

pytestmark = pytest.mark.once

RATE = 0.1


class Gain(nnx.Param):
    """A parameter of a type of its own, which the code of a module relies on."""

    def doubled(self):
        return 2 * self[...]


class Particular(nnx.Module):
    """A module that looks at the types and the metadata of its parameters."""

    def __init__(self, rngs):
        self.gain = Gain(normal(3, 1, 4), note="gain")
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.adapted = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        self.offset = nnx.data(normal(4, 1, 3))

    def __call__(self, x):
        assert isinstance(self.gain, Gain)
        assert self.gain.note == "gain"
        assert type(self.linear.kernel) is nnx.Param
        assert type(self.adapted.lora.lora_a) is nnx.LoRAParam
        vectors = [x for x in jax.tree.leaves(nnx.state(self, nnx.Param)) if x.ndim == 1]
        assert len(vectors) == 2
        decay = sum(jnp.sum(x**2) for x in vectors)
        return self.adapted(self.linear(self.gain.doubled() * x)) + self.offset + decay


KINDS = [*CASES, Case(Network, X), Case(Particular, X, targets=("kernel",))]
FILTERS = {
    "Param": nnx.Param,
    "LoRAParam": nnx.LoRAParam,
    "Factor": Factor,
    "OfType": nnx.OfType(nnx.Param),
    "Any": nnx.Any(nnx.LoRAParam, nnx.Param),
    "function": lambda path, leaf: isinstance(leaf, nnx.Param),
}


@pytest.fixture(params=KINDS, ids=lambda case: case.make.__name__)
def case(request):
    return request.param


@pytest.fixture
def model():
    return Sequential()


def loss_of(model, x):
    return jnp.sum(jnp.sin(model(x)))


def by_path(state):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def by_optimizer(wrt):
    """Return one step of `nnx.Optimizer` with a filter."""

    @nnx.jit
    def step(model, x):
        optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=wrt)
        grads = nnx.grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, x)
        optimizer.update(model, grads)

    return step


def step_by_default(model, x):
    """Take one step of an optimizer that holds its model, and filters as NNX does by itself."""
    optimizer = nnx.ModelAndOptimizer(model, optax.sgd(RATE))
    _, grads = nnx.value_and_grad(loss_of)(optimizer.model, x)
    optimizer.update(grads)


by_default = nnx.jit(step_by_default)


def by_split(wrt):
    """Return one step in plain JAX, on what `nnx.split` separates."""

    def step(model, x):
        graphdef, trained, rest = nnx.split(model, wrt, ...)

        @jax.jit
        def run(trained, rest):
            def loss(trained):
                model = nnx.merge(graphdef, trained, rest, copy=True)
                return loss_of(model, x), nnx.state(model, nnx.Not(wrt))

            grads, rest_after = jax.grad(loss, has_aux=True)(trained)
            return jax.tree.map(lambda x, g: x - RATE * g, trained, grads), rest_after

        nnx.update(model, *run(trained, rest))

    return step


STEPS = {
    "Optimizer, Param": by_optimizer(nnx.Param),
    "Optimizer, LoRAParam": by_optimizer(nnx.LoRAParam),
    "ModelAndOptimizer": by_default,
    "split, Param": by_split(nnx.Param),
}


def test_filters_for_parameters_select_the_factors(case):
    adapted = case.adapted()
    names = {path: ("a", "b") for path in adapted.factors}
    wanted = [("factors", path, name) for path in sorted(names) for name in names[path]]
    for wrt in FILTERS.values():
        assert [path for path, _ in nnx.to_flat_state(nnx.state(adapted, wrt))] == wanted
    held = nnx.state(nnx.jit(case.make)(nnx.Rngs(0)), nnx.Param)
    frozen = nnx.state(adapted.model, Frozen)
    assert list(by_path(frozen)) == list(by_path(held))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(frozen), jax.tree.leaves(held))


def test_every_way_to_train_takes_the_same_step_of_the_factors_alone(case):
    first = pretrained(case.adapted())
    before = by_path(nnx.state(first, Factor))
    frozen = by_path(nnx.state(first, Frozen))
    merged = jaxlora.nnx.merge(first)
    merged(case.x)
    ends = {}
    for name, step in STEPS.items():
        model = copied(first)
        step(model, case.x)
        ends[name] = by_path(nnx.state(model, Factor))
        jax.tree.map(np.testing.assert_array_equal, by_path(nnx.state(model, Frozen)), frozen)
        close(nnx.state(model.model, nnx.Not(Frozen)), nnx.state(merged, nnx.Not(nnx.Param)))
    for name, end in ends.items():
        assert all((end[path] != before[path]).any() for path in before), name
        close(end, ends["split, Param"])


def test_step_is_that_of_the_functional_api(model, key):
    adapted = pretrained(adapt(key, model, X, config=CONFIG))
    base, adapters = jaxlora.split(adapted.params())
    graphdef = nnx.graphdef(model)

    def loss(adapters):
        run = jaxlora.lora(lambda state: loss_of(nnx.merge(graphdef, state), X))
        return run(jaxlora.bind(base, adapters))

    wanted = jax.tree.map(lambda x, g: x - RATE * g, adapters, jax.grad(loss)(adapters))
    by_default(adapted, X)
    got = adapted.adapters()
    for path, adapter in wanted.items():
        np.testing.assert_allclose(got[path].a, adapter.a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got[path].b, adapter.b, rtol=1e-4, atol=1e-5)


def test_leaves_that_are_trained_whole_are_factors(model, key):
    config = jaxlora.LoRAConfig(rank=2, alpha=4, targets=("up/kernel",), train=("down/bias",))
    adapted = adapt(key, model, X, config=config)
    before = by_path(nnx.state(adapted, nnx.Param))
    assert sorted(before) == [
        ("factors", "down/bias", "value"),
        ("factors", "up/kernel", "a"),
        ("factors", "up/kernel", "b"),
    ]
    pretrained(adapted)
    start, bias = by_path(nnx.state(adapted, nnx.Param)), np.asarray(model.down.bias[...])
    by_default(adapted, X)
    after = by_path(nnx.state(adapted, nnx.Param))
    assert all((start[path] != after[path]).any() for path in start)
    np.testing.assert_array_equal(adapted.model.down.bias[...], bias)
    merged = jaxlora.nnx.merge(adapted)
    np.testing.assert_array_equal(merged.down.bias[...], after["factors", "down/bias", "value"])


def test_module_given_is_not_altered(case):
    model = nnx.jit(case.make)(nnx.Rngs(0))
    kept, config = copied(model), dataclasses.replace(CONFIG, targets=case.targets)
    adapted = adapt(jax.random.key(0), model, case.x, config=config)
    for _ in range(2):
        by_default(adapted, case.x)
    adapted.eval()
    adapted(case.x)
    assert nnx.graphdef(model) == nnx.graphdef(kept)
    close(nnx.state(model), nnx.state(kept), atol=0)
    again = adapt(jax.random.key(0), model, case.x, config=config)
    close(again(case.x), kept(case.x))


def test_weights_are_not_copied(model, key):
    adapted = adapt(key, model, X, config=CONFIG)
    held = dict(nnx.to_flat_state(nnx.state(adapted.model)))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert held[path].get_raw_value() is leaf.get_raw_value()


def test_types_and_metadata_come_back():
    case = KINDS[-1]
    model = nnx.jit(case.make)(nnx.Rngs(0))
    adapted = case.adapted()
    for plain in (adapted.params(), nnx.state(jaxlora.nnx.merge(adapted))):
        for (path, got), (_, wanted) in zip(
            nnx.to_flat_state(plain), nnx.to_flat_state(nnx.state(model)), strict=True
        ):
            assert type(got) is type(wanted), path
            if isinstance(wanted, nnx.Variable):
                assert got.get_metadata() == wanted.get_metadata()
    assert nnx.graphdef(jaxlora.nnx.merge(adapted)) == nnx.graphdef(model)
    kept: Any = adapted.model.gain
    assert (type(kept), kept.param_type, kept.note) == (Frozen, Gain, "gain")


def test_only_the_adapted_part_of_a_larger_module_is_frozen(key):
    outer = Sequential()
    outer.up = adapt(key, outer.up, X, config=CONFIG)
    pretrained(outer)
    factors = [("up", "factors", "kernel", name) for name in "ab"]
    down = [("down", "bias"), ("down", "kernel")]
    assert list(by_path(nnx.state(outer, nnx.LoRAParam))) == factors
    assert list(by_path(nnx.state(outer, nnx.Param))) == [*down, *factors]
    for wrt, moved in ((nnx.LoRAParam, factors), (nnx.Param, [*down, *factors])):
        before = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(outer))}
        by_optimizer(wrt)(outer, X)
        after = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(outer))}
        assert [path for path in after if (before[path] != after[path]).any()] == moved


def test_state_is_stored_by_orbax_and_as_a_plain_dict(case, tmp_path):
    adapted = pretrained(case.adapted())
    others = nnx.Not(nnx.RngKey)  # a typed key is no array to Orbax
    state = nnx.to_pure_dict(nnx.state(adapted, others))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        loaded = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    fresh = case.adapted(key=1)
    empty = nnx.state(fresh, others)
    nnx.replace_by_pure_dict(empty, loaded)
    nnx.update(fresh, empty)
    close(fresh(case.x), adapted(case.x), atol=0)


def test_compiled_loops_keep_the_graph(model, key):
    adapted = pretrained(adapt(key, model, X, config=CONFIG))
    wanted = copied(adapted)
    step = nnx.cached_partial(nnx.jit(step_by_default), adapted)
    for _ in range(3):
        step(X)
        by_default(wanted, X)
    close(nnx.state(adapted), nnx.state(wanted))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def steps(model, x):
        by_default(model, x)
        return model

    trained = steps(copied(adapted), jnp.stack([X] * 3))
    for _ in range(3):
        by_default(wanted, X)
    close(nnx.state(trained), nnx.state(wanted))
