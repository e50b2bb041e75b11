"""Eight devices: the factors live where the axes that they carry live, and stay there."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import P
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from devices import meshes

SHAPES = {"dense": (16, 8), "out": (8, 4, 16), "experts": (16, 4, 8)}
SPECS = {
    "dense": P("data", "model"),
    "out": P("model", None, "data"),
    "experts": P("data", "model", None),
}
FACTORS = {
    "dense": (P("data", None), P(None, "model")),
    "out": (P("model", None, None), P(None, "data")),
    "experts": (P("model", "data", None), P("model", None, None)),
}
CONFIG = jaxlora.LoRAConfig(rank=3, alpha=6)


def model(params, x):
    heads = jnp.einsum("bni,nio->bo", jnp.ones((2, 8, 4)), params["out"])
    routed = jnp.ones((4, 2, 16))
    mesh = jax.typeof(params["experts"]).sharding.mesh
    if mesh.explicit_axes:
        routed = jax.sharding.reshard(routed, NamedSharding(mesh, P("model")))
    experts = jnp.einsum("ebi,ieo->ebo", routed, params["experts"])
    return x @ params["dense"], heads, experts


@pytest.fixture(scope="module")
def plain():
    return meshes.random(SHAPES)


@pytest.fixture(scope="module", params=[*meshes.KINDS, "explicit, set"])
def placed(request, plain):
    return meshes.place(plain, SPECS, meshes.make(request.param.split(", ")[0]))


@pytest.fixture(autouse=True)
def mesh_in_use(request):
    """Set the mesh of the base, in the cases that say so."""
    case = (
        request.node.callspec.params.get("placed", "") if "placed" in request.fixturenames else ""
    )
    with (
        jax.set_mesh(meshes.make("explicit")) if case.endswith("set") else contextlib.nullcontext()
    ):
        yield


@pytest.fixture
def base(placed, mesh_in_use):
    return placed


X = np.ones((2, 16), np.float32)
init = functools.partial(jaxlora.init, config=CONFIG)


def trained(params):
    """Return adapted weights whose factors are all not zero, on the same devices."""

    def fill(node):
        b = np.random.default_rng(1).standard_normal(node.b.shape).astype(np.float32)
        known = isinstance(node.b.sharding, NamedSharding)
        b = jax.device_put(b, node.b.sharding if known else None)
        return dataclasses.replace(node, terms=(dataclasses.replace(node.term, b=b),))

    return jax.tree.map(fill, params, is_leaf=lambda x: isinstance(x, jaxlora.LoRAWeight))


@pytest.fixture(scope="module")
def plain_params(plain):
    return trained(init(jax.random.key(0), model, plain, X))


@pytest.fixture(scope="module")
def params(placed):
    return trained(init(jax.random.key(0), model, placed, X))


def assert_placed(params):
    for name, node in params.items():
        assert meshes.is_placed(node.base, *SPECS[name]), name
        for factor, spec in zip((node.a, node.b), FACTORS[name], strict=True):
            assert meshes.is_placed(factor, *spec), (name, factor.sharding, spec)


def test_init_draws_the_same_values_where_the_base_is(key, plain, base):
    wanted = init(key, model, plain, X)
    for params in (init(key, model, base, X), jax.jit(init, static_argnums=1)(key, model, base, X)):
        assert_placed(params)
        for name in SHAPES:
            assert_array_equal(params[name].a, wanted[name].a)
            assert_array_equal(params[name].b, wanted[name].b)


def test_init_draws_the_same_values_also_through_several_operations(key, plain, base):
    config = jaxlora.LoRAConfig(rank=3, initializer="normal", targets=("dense",))
    wanted = init(key, model, plain, X, config=config)
    assert_array_equal(init(key, model, base, X, config=config)["dense"].a, wanted["dense"].a)


def test_starts_from_the_weight_live_where_the_base_is(key, plain, base):
    config = jaxlora.LoRAConfig(rank=3, initializer="pissa")
    wanted = init(key, model, plain, X, config=config)
    start = functools.partial(init, config=config)
    for params in (
        start(key, model, base, X),
        jax.jit(start, static_argnums=1)(key, model, base, X),
    ):
        for name, node in params.items():
            assert_allclose(node.base, wanted[name].base, rtol=1e-3, atol=1e-4)
            assert_allclose(node.delta(), wanted[name].delta(), rtol=1e-3, atol=1e-4)
        assert_placed(params)


def test_magnitudes_live_with_the_columns(key, plain, base):
    config = dataclasses.replace(CONFIG, magnitude=True)
    columns = {"dense": P("model"), "out": P("data"), "experts": P("model", None)}
    start = functools.partial(init, config=config)
    wanted = trained(start(key, model, plain, X))
    run = jax.jit(jaxlora.lora(model, strict=True))
    for made in (
        start(key, model, base, X),
        jax.jit(start, static_argnums=1)(key, model, base, X),
    ):
        params = trained(made)
        assert_placed(params)
        for name, node in params.items():
            assert meshes.is_placed(node.magnitude, *columns[name])
            assert_allclose(node.magnitude, wanted[name].magnitude, rtol=1e-5)
        for got, y in zip(run(params, X), jaxlora.lora(model)(wanted, X), strict=True):
            assert_allclose(got, y, rtol=1e-4, atol=1e-4)


def test_init_of_factors_alone_under_jit_keeps_them_apart(key, base):
    fn = jax.jit(lambda key, base: jaxlora.split(init(key, model, base, X))[1])
    adapters = fn(key, base)
    assert_placed(jaxlora.bind(base, adapters))
    text = fn.lower(key, base).compile().as_text() or ""
    assert "HloModule" in text
    assert "all-gather" not in text
    for shape in ("f32[16,3]", "f32[8,4,3]", "f32[4,16,3]", "f32[4,3,8]", "f32[16,8]"):
        assert shape not in text


def test_init_takes_keys_of_every_kind(key, base):
    wanted = init(key, model, base, X)["dense"].a
    everywhere = NamedSharding(base["dense"].sharding.mesh, P())
    keys = [jax.random.PRNGKey(0), jax.device_put(key, everywhere)]
    if jax.sharding.get_mesh().empty:
        keys.append(jax.device_put(key, jax.devices()[3]))
    for other in keys:
        assert_array_equal(init(other, model, base, X)["dense"].a, wanted)


def test_init_with_only_the_key_traced(key, base):
    wanted = init(key, model, base, X)
    fn = jax.jit(lambda key: jaxlora.split(init(key, model, base, X))[1])
    for other in (key, jax.device_put(key, NamedSharding(base["dense"].sharding.mesh, P()))):
        adapters = fn(other)
        assert_placed(jaxlora.bind(base, adapters))
        assert_array_equal(adapters["dense"].a, wanted["dense"].a)


def test_init_maps_over_keys(key, plain):
    base = meshes.place(plain, SPECS, meshes.make("auto"))
    many = jax.vmap(lambda key: init(key, model, base, X)["dense"].a)(key[None])
    assert_array_equal(many[0], init(key, model, base, X)["dense"].a)


def test_init_takes_shapes(key, base):
    shapes = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), base
    )
    wanted = init(key, model, base, X)
    drawn = init(key, model, shapes, X)
    abstract = jax.eval_shape(lambda key, base: init(key, model, base, X), key, shapes)
    for name, (spec_a, _) in FACTORS.items():
        assert meshes.is_placed(drawn[name].a, *spec_a)
        assert_array_equal(drawn[name].a, wanted[name].a)
        assert abstract[name].a.shape == wanted[name].a.shape
        if base[name].sharding.mesh.are_all_axes_explicit:
            assert abstract[name].a.sharding.spec == spec_a


def test_dropout_keys_live_with_the_stack(key, plain_params, params):
    wanted = jaxlora.dropout(plain_params, key, 0.5)
    eager = jaxlora.dropout(params, key, 0.5)
    assert meshes.is_placed(eager["experts"].dropout_keys, "model")
    for dropped in (eager, jax.jit(jaxlora.dropout, static_argnums=2)(params, key, 0.5)):
        assert_placed(dropped)
        for name, node in dropped.items():
            data = jax.random.key_data(node.dropout_keys)
            assert_array_equal(data, jax.random.key_data(wanted[name].dropout_keys))


def test_merge_and_unmerge_stay_where_the_base_is(plain, plain_params, params):
    wanted = jaxlora.merge(plain_params)
    _, adapters = jaxlora.split(params)
    for merge in (jaxlora.merge, jax.jit(jaxlora.merge)):
        merged = merge(params)
        for name, weight in merged.items():
            assert meshes.is_placed(weight, *SPECS[name])
            assert_allclose(weight, wanted[name], rtol=1e-6, atol=1e-6)
        back = jaxlora.unmerge(merged, adapters)
        for name, weight in back.items():
            assert meshes.is_placed(weight, *SPECS[name])
            assert_allclose(weight, plain[name], rtol=1e-5, atol=1e-5)


def test_merge_sends_no_more_than_scalars(params):
    both = lambda params: (jaxlora.merge(params), jaxlora.merge_error(params))  # noqa: E731
    sent = meshes.collectives(both, params)
    assert all(meshes.size(collective) == 1 for collective in sent), sent


def test_split_knows_weights_again_wherever_they_are(plain_params, params):
    _, wanted = jaxlora.split(plain_params)
    _, adapters = jaxlora.split(params)
    assert {name: a.fingerprint.digest for name, a in adapters.items()} == {
        name: a.fingerprint.digest for name, a in wanted.items()
    }


def test_fingerprint_sends_no_more_than_its_sample():
    from jaxlora.weights import sampling

    for kind in meshes.KINDS:
        mesh = meshes.make(kind)
        weight = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("data", "model")))
        sent = meshes.collectives(sampling._sample, weight)
        assert all(meshes.size(collective) <= 256 for collective in sent), sent


def test_freeze_keeps_every_array_where_it_is(params):
    tx = jaxlora.freeze(optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, state = step(params, state)
    assert_placed(after)
    for name, node in params.items():
        assert_array_equal(after[name].base, node.base)


def test_adapters_load_where_the_base_is(plain, plain_params, base, params, tmp_path):
    for trained_params in (params, plain_params):
        _, adapters = jaxlora.split(trained_params)
        jaxlora.save_adapters(tmp_path / "adapters", adapters)
        loaded = jaxlora.load_adapters(tmp_path / "adapters", base=base)
        jax.tree.map(assert_array_equal, loaded, adapters)
        assert_placed(jaxlora.bind(base, loaded))
        loaded = jaxlora.load_adapters(tmp_path / "adapters", base=plain)
        jax.tree.map(assert_array_equal, loaded, adapters)
        if jax.sharding.get_mesh().empty:
            assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(loaded))


def test_adapters_load_on_another_mesh(plain, plain_params, tmp_path):
    base = meshes.place(plain, SPECS, meshes.make("auto"))
    elsewhere = meshes.place(plain, SPECS, meshes.make("auto", "turned"))
    _, adapters = jaxlora.split(plain_params)
    jaxlora.save_adapters(tmp_path / "adapters", adapters)
    here = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    jaxlora.save_adapters(tmp_path / "again", here)
    there = jaxlora.load_adapters(tmp_path / "again", base=elsewhere)
    assert_placed(jaxlora.bind(elsewhere, there))
    jax.tree.map(assert_array_equal, there, adapters)


def test_merged_weights_are_saved_from_where_they_are(params, tmp_path):
    jaxlora.save_merged(tmp_path / "merged", params)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "merged", jaxlora.merge(params))
    jax.tree.map(assert_array_equal, restored, jaxlora.merge(params))
    for name, weight in restored.items():
        assert meshes.is_placed(weight, *SPECS[name])
