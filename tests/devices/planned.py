"""Eight devices: a plan has the bytes of each device of the step that a user compiles there."""

import math

import jax
import planned_models
import pytest
from jax import P
from jax.sharding import NamedSharding
from planned_models import OPTIMIZER, check_near, full_flops, user_step, xla_flops

import jaxlora
from devices import meshes
from devices.laws import CASES
from jaxlora.planning import plan

MODELS = {
    "benchmark": lambda: planned_models.benchmark(layers=2),
    "minilm": planned_models.minilm,
    "scanned": lambda: planned_models.scanned(layers=2, batch=8),
}


@pytest.fixture(autouse=True)
def as_a_user():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def spec_of(leaf):
    """Shard the last two axes along "data" and "model", where they divide them."""
    if len(leaf.shape) < 2:
        return None
    parts: list[str | None] = [None] * (len(leaf.shape) - 2)
    for size, (name, count) in zip(leaf.shape[-2:], meshes.LAYOUTS["both"].items(), strict=True):
        parts.append(None if size % count else name)
    return P(*parts)


def placed(model, mesh):
    """Return the data on the devices, and the specs of the weights."""
    data = NamedSharding(mesh, P("data"))
    return [x.update(sharding=data) for x in model.args], jax.tree.map(spec_of, model.params)


def planned(model, mesh, args, specs):
    return plan(
        model.loss,
        model.params,
        *args,
        config=model.config,
        optimizer=OPTIMIZER,
        mesh=mesh,
        shardings=specs,
    )


def memory_of_user(model, mesh, args, specs):
    """Return what the compiler reports of a step over factors that `jaxlora.init` has placed."""

    def put(leaf, spec):
        return leaf.update(sharding=NamedSharding(mesh, spec or P()))

    params = jax.tree.map(put, model.params, specs)
    made = jaxlora.init(planned_models.KEY, model.loss, params, *args, config=model.config)
    base, adapters = jaxlora.split(made)
    state = OPTIMIZER.init(adapters)
    step = user_step(model.loss).lower(adapters, state, base, *args)
    return planned_models.memory(step.compile())


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_each_device_are_those_of_the_user_s_step(name):
    model, mesh = MODELS[name](), meshes.make("auto")
    args, specs = placed(model, mesh)
    found = planned(model, mesh, args, specs)
    check_near(found, memory_of_user(model, mesh, args, specs))
    assert found.devices == 8
    assert "each of 8 devices" in str(found)
    terms = (found.lora.base_bytes, found.lora.trained_bytes, found.lora.state_bytes)
    assert sum(terms) + found.lora.data_bytes == found.argument_bytes
    leaves = jax.tree.leaves(model.params)
    cut = [spec_of(leaf) or () for leaf in leaves]
    parts = [math.prod(meshes.LAYOUTS["both"].get(name, 1) for name in spec) for spec in cut]
    held = [x.size * x.dtype.itemsize // n for x, n in zip(leaves, parts, strict=True)]
    assert found.lora.base_bytes == sum(held)


def loss(params, x):
    return ((x @ params["up"] @ params["down"]) ** 2).mean()


def test_operations_are_those_of_xla_for_each_device():
    mesh, config = meshes.make("auto"), jaxlora.LoRAConfig(rank=4)
    params = {"up": planned_models.shape(64, 256), "down": planned_models.shape(256, 64)}
    everywhere, x = planned_models.shape(32, 64), planned_models.shape(32, 64)
    x = x.update(sharding=NamedSharding(mesh, P("data")))
    settings = {"config": config, "optimizer": OPTIMIZER, "mesh": mesh}
    alone = plan(loss, params, everywhere, **settings)
    rows = plan(loss, params, x, **settings)
    both = plan(loss, params, x, **settings, shardings={"up": P(None, "model"), "down": P("model")})
    alone, rows, both = map(full_flops, (alone, rows, both))
    assert (alone // 4, alone // 8) == (rows, both)
    params = jax.tree.map(lambda w: w.update(sharding=NamedSharding(mesh, P())), params)
    xla = xla_flops(jax.jit(jax.grad(loss)).lower(params, x).compile())
    assert 0.9 * xla < rows <= xla


def test_plan_on_an_explicit_mesh_is_that_of_arrays_on_it():
    (case,) = [case for case in CASES if (case.kind, case.layout) == ("explicit", "both")]
    with jax.set_mesh(case.mesh):
        base, adapters, x = case.arrays
        config = jaxlora.LoRAConfig(rank=3, alpha=6)
        found = plan(case.loss, base, x, config=config, optimizer=OPTIMIZER)
        state = OPTIMIZER.init(adapters)
        step = user_step(case.loss).lower(adapters, state, base, x)
        check_near(found, planned_models.memory(step.compile()))
    assert found.devices == 8


def test_shardings_that_do_not_divide_are_refused():
    model, mesh = planned_models.minilm(), meshes.make("auto")
    specs = jax.tree.map(lambda leaf: None, model.params)
    specs["params"]["encoder"]["word"]["embedding"] = P("data")
    with pytest.raises(ValueError, match=r"of 'params/encoder/word/embedding' does not fit its"):
        planned(model, mesh, model.args, specs)
