"""Weights in host memory: all is computed the same, and each array is where it belongs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices.meshes import KINDS
from jax import P
from jax.sharding import NamedSharding, SingleDeviceSharding
from numpy.testing import assert_allclose

import jaxlora
from jaxlora import analysis, calibration, initializers
from jaxlora.initializers.registry import InitializerName

LAYERS, WIDTH, ROWS = 3, 16, 32
KEY, X = jax.random.key(0), jnp.arange(8)
PLACES = ("one device", *KINDS)  # of which the meshes are of all devices
CONFIG = jaxlora.LoRAConfig(rank=2, alpha=4, targets=("table", "layers"))
LAYERS_ALONE = jaxlora.LoRAConfig(rank=2, targets=("layers",))
NF4 = jaxlora.QuantizationConfig("nf4", targets=("layers",), block_size=4)


def fn(params, x):
    """Look rows up and pass them through layers, each weight moved to the device where it is used.

    A weight that is there already stays.
    """
    moved = jax.memory.Space.Device

    def layer(h, w):
        return jnp.tanh(h @ jax.device_put(w, moved)), None

    rows = jax.device_put(params["table"], moved).at[x].get(out_sharding=_whole(params["table"]))
    return jax.lax.scan(layer, rows, params["layers"])[0]


def _whole(table):
    mesh = jax.typeof(table).sharding.mesh
    return NamedSharding(mesh, P()) if mesh.explicit_axes else None


def weights(place, memory):
    """Return the parameters on a place, in a memory."""
    drawn = {
        "table": 0.3 * jax.random.normal(KEY, (ROWS, WIDTH)),
        "layers": 0.3 * jax.random.normal(KEY, (LAYERS, WIDTH, WIDTH)),
    }
    if place == "one device":
        return jax.device_put(drawn, SingleDeviceSharding(jax.devices()[0], memory_kind=memory))
    mesh = jax.make_mesh((len(jax.devices()),), ("model",), (KINDS[place],))
    specs = {"table": P("model"), "layers": P(None, "model")}  # the in axes, and rows
    return {
        name: jax.device_put(drawn[name], NamedSharding(mesh, specs[name], memory_kind=memory))
        for name in drawn
    }


def adapted(params, **options):
    """Return parameters with adapters as after some training."""
    config = dataclasses.replace(CONFIG, **options)
    base, adapters = jaxlora.split(jaxlora.init(KEY, fn, params, X, config=config))
    return jaxlora.bind(base, jax.tree.map(lambda x: x + 0.1, adapters))


def trained_whole(params):
    config = jaxlora.LoRAConfig(rank=2, targets=("layers",), train=("table",))
    return jaxlora.init(KEY, fn, params, X, config=config)


def quantized(params):
    return jaxlora.quantize(fn, params, X, config=NF4)


def unmerged(params):
    merged = jaxlora.merge(adapted(params))
    return jaxlora.unmerge(merged, jaxlora.split(adapted(params))[1])


NAMES: tuple[InitializerName, ...] = ("orthogonal", "zero_a", "pissa", "milora", "olora")
TREES = {  # of parameters, whose weights stay where they were
    "init": adapted,
    "magnitude": lambda params: adapted(params, magnitude=True),
    "trained whole": trained_whole,
    **{name: functools.partial(adapted, initializer=name) for name in NAMES},
    "loftq": lambda params: jaxlora.init(
        KEY,
        fn,
        quantized(params),
        X,
        config=jaxlora.LoRAConfig(
            rank=2, targets=("layers",), initializer=initializers.loftq(params)
        ),
    ),
    "merge": lambda params: jaxlora.merge(adapted(params)),
    "merge, donated": lambda params: jaxlora.merge(
        adapted(jax.tree.map(jnp.copy, params)), donate=True
    ),
    "merge, magnitude": lambda params: jaxlora.merge(adapted(params, magnitude=True)),
    "merge, trained whole": lambda params: jaxlora.merge(trained_whole(params)),
    "merge, quantized": lambda params: jaxlora.merge(adapted(quantized(params))),
    "merge, quantized again": lambda params: jaxlora.merge(
        adapted(quantized(params)), requantize=True
    ),
    "unmerge": unmerged,
    "quantize": quantized,
    "dequantize": lambda params: jaxlora.dequantize(quantized(params)),
}


def loss(adapters, base):
    return jnp.square(jaxlora.lora(fn)(jaxlora.bind(base, adapters), X)).mean()


def gradients(params):
    base, adapters = jaxlora.split(adapted(params))
    return jax.jit(jax.grad(loss))(adapters, base)


def step(params):
    base, adapters = jaxlora.split(adapted(params))
    tx = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.grad(loss)(adapters, base), tx.init(adapters), adapters)
    return optax.apply_updates(adapters, updates)


RESULTS = {  # of what is computed from weights, on devices
    "forward": lambda params: jax.jit(jaxlora.lora(fn))(adapted(params), X),
    "forward, quantized": lambda params: jax.jit(jaxlora.lora(fn))(adapted(quantized(params)), X),
    "forward, magnitude": lambda params: jax.jit(jaxlora.lora(fn))(
        adapted(params, magnitude=True), X
    ),
    "gradients": gradients,
    "step": step,
    "forward, part with magnitude": lambda params: jax.jit(jaxlora.lora(fn))(
        adapted(params, magnitude=True, targets=("layers[1:3, :, 4:]",)), X
    ),
    "moments": lambda params: calibration.moments(fn, params, [(X,)], config=LAYERS_ALONE),
    "mean gradients": lambda params: calibration.gradients(
        lambda params, x: jnp.square(fn(params, x)).mean(), params, [(X,)], config=LAYERS_ALONE
    ),
    "merge_error": lambda params: jaxlora.merge_error(adapted(params)),
    "part of a weight": lambda params: analysis.amplification(
        params, jaxlora.split(adapted(params, targets=("layers[1:3, :, 4:]",)))[1]
    ),
    "delta": lambda params: jaxlora.algebra.delta(adapted(params), "layers"),
    "delta, magnitude": lambda params: jaxlora.algebra.delta(
        adapted(params, magnitude=True), "layers"
    ),
    "extract": lambda params: (
        jaxlora.algebra.extract(
            params, jaxlora.merge(adapted(params)), 2, sites=jaxlora.find_sites(fn, params, X)
        ).energy
    ),
    "explained": lambda params: (
        analysis.explained(params, (2,), sites=jaxlora.find_sites(fn, params, X))["table"].energy
    ),
}


def memories(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def check_equal(got, wanted):
    jax.tree.map(
        lambda x, y: assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-6),
        got,
        wanted,
    )


def cases(table, on_meshes):
    """Return all of a table on one device, and what is named on meshes."""
    return [(place, name) for place in PLACES for name in (on_meshes if place in KINDS else table)]


def both(place):
    """Return the same parameters in host memory and in that of the devices."""
    return [weights(place, memory) for memory in ("pinned_host", "device")]


@pytest.mark.parametrize(
    ("place", "name"), cases(TREES, ("magnitude", "pissa", "merge", "merge, quantized again"))
)
def test_weights_stay_in_host_memory_and_factors_do_not(place, name):
    on_host, on_device = map(TREES[name], both(place))
    for path, leaf in on_host.items():
        base = getattr(leaf, "base", leaf)
        assert (path, memories(base)) == (path, {"pinned_host"})
        if base is not leaf:
            assert memories(jaxlora.split(on_host)[1]) == {"device"}
    check_equal(jax.device_get(on_host), jax.device_get(on_device))


@pytest.mark.parametrize(
    ("place", "name"), cases(RESULTS, ("forward, quantized", "forward, magnitude", "gradients"))
)
def test_results_are_those_of_weights_on_devices(place, name):
    on_host, on_device = map(RESULTS[name], both(place))
    assert memories([x for x in jax.tree.leaves(on_host) if isinstance(x, jax.Array)]) <= {"device"}
    check_equal(on_host, on_device)


def test_no_stack_is_on_a_device_where_layers_are_rematerialized():
    params = weights("one device", "pinned_host")

    def rematerialized(params, x):
        @jax.checkpoint
        def layer(h, w):
            return jnp.tanh(h @ jax.device_put(w, jax.memory.Space.Device)), None

        return jax.lax.scan(layer, x, params["layers"])[0].sum()

    x = jnp.ones((4, WIDTH))
    adapters = jaxlora.split(jaxlora.init(KEY, rematerialized, params, x, config=LAYERS_ALONE))[1]
    apply = jaxlora.lora(rematerialized)
    program = jax.make_jaxpr(jax.grad(lambda adapters: apply(jaxlora.bind(params, adapters), x)))
    loops = [eqn for eqn in program(adapters).eqns if eqn.primitive.name == "scan"]
    shape = params["layers"].shape
    stacks = [v.aval for eqn in loops for v in (*eqn.invars, *eqn.outvars) if v.aval.shape == shape]
    assert len(loops) == len(stacks) == 2  # forward and backward
    assert {aval.memory_space for aval in stacks} == {jax.memory.Space.Host}


@pytest.mark.parametrize("is_abstract", [False, True])
def test_weights_in_host_memory_are_not_planned_as_if_on_devices(is_abstract):
    params = weights("one device", "pinned_host")
    if is_abstract:
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
    with pytest.raises(ValueError, match="'layers' is in host memory"):
        jaxlora.planning.plan(fn, params, X, config=CONFIG, optimizer=optax.sgd(1.0))
