"""Eight devices: the codes of quantized weights live where the weights lived."""

import contextlib
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose

import jaxlora
from devices import meshes

SHAPES = {"up": (3, 64, 128), "down": (3, 128, 64)}
SPECS = {"up": P(None, "data", "model"), "down": P(None, "model", None)}
NF4 = jaxlora.QuantizationConfig("nf4", block_size=8)
LORA = jaxlora.LoRAConfig(rank=3, alpha=6)


def model(params, x):
    def layer(x, w):
        h = jnp.tanh(x @ w["up"])
        mesh = jax.typeof(h).sharding.mesh
        out: Any = {"out_sharding": P()} if mesh.explicit_axes else {}
        return jnp.einsum("bi,io->bo", h, w["down"], **out), None

    return jax.lax.scan(layer, x, params)[0]


@pytest.fixture(scope="module")
def plain():
    return meshes.random(SHAPES)


@pytest.fixture(params=meshes.KINDS)
def placed(request, plain):
    mesh = meshes.make(request.param)
    is_explicit = request.param == "explicit"
    specs = {n: P(*spec[:2], None) for n, spec in SPECS.items()} if is_explicit else SPECS
    specs = specs | {"up": P(None, None, "model")} if is_explicit else specs
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
        yield meshes.place(plain, specs, mesh)


X = jnp.cos(jnp.arange(4 * 64.0)).reshape(4, 64)


def results(params) -> dict[str, Any]:
    """Return what is made of quantized weights."""
    adapted = jaxlora.init(jax.random.key(0), model, params, X, config=LORA)
    base, adapters = jaxlora.split(adapted)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)

    def loss(adapters, base, key):
        adapted = jaxlora.dropout(jaxlora.bind(base, adapters), key, 0.1)
        return jnp.sum(jaxlora.lora(model)(adapted, X) ** 2)

    bound = jaxlora.bind(base, adapters)
    again = jaxlora.merge(bound, requantize=True)
    return {
        "gradients": jax.jit(jax.grad(loss))(adapters, base, jax.random.key(0)),
        "merged": jaxlora.merge(bound),
        "again": {path: weight.codes for path, weight in again.items()},
    }


def test_values_are_those_of_one_device(placed, plain):
    params = jaxlora.quantize(model, placed, X, config=NF4)
    of_one = jaxlora.quantize(model, plain, X, config=NF4)
    got, wanted = results(params), results(jax.tree.map(np.asarray, params))
    for name in ("gradients", "merged"):
        for x, y in zip(*(jax.tree.leaves(found[name]) for found in (got, wanted)), strict=True):
            x, y = jax.device_get((x, y))
            assert_allclose(x, y, rtol=0, atol=1e-4 * abs(y).max())
    for path, weight in placed.items():
        for codes, others in (
            (params[path].codes, of_one[path].codes),
            (got["again"][path], wanted["again"][path]),
        ):
            assert codes.sharding.is_equivalent_to(weight.sharding, codes.ndim)
            same = jax.device_get(codes) == jax.device_get(others)
            assert same.mean() > 0.999  # what lies between two codes goes to either


def test_start_of_loftq_lives_where_the_base_does(placed):
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    params = jaxlora.quantize(model, placed, x, config=NF4)
    start = jaxlora.initializers.loftq(placed)
    config = jaxlora.LoRAConfig(rank=3, initializer=start)
    adapted = jaxlora.init(jax.random.key(0), model, params, x, config=config)
    for path, weight in placed.items():
        spec = (*weight.sharding.spec, None, None)[:3]
        assert meshes.is_placed(adapted[path].a, spec[0], spec[1], None)
        assert meshes.is_placed(adapted[path].b, spec[0], None, spec[2])
        assert meshes.is_placed(adapted[path].base.codes, *spec)


def largest_gather(fn, *args):
    """Return the number of elements of the largest array that a compiled function gathers."""
    found = meshes.collectives(fn, *args)
    return max(meshes.size(each) for each in found if each[0] == "all-gather")


@pytest.mark.parametrize("targets", ["all-linear", None])
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("kind", meshes.KINDS)
def test_a_program_that_gathers_its_weights_gathers_their_codes(plain, kind, turned, targets):
    mesh = meshes.make(kind)
    specs = {"up": P(None, "data", "model"), "down": P(None, "model", "data")}
    gather = jax.sharding.reshard if kind == "explicit" else jax.lax.with_sharding_constraint

    def gathered(w, *spec):
        if turned:
            return gather(w.T, NamedSharding(mesh, P(*reversed(spec)))).T
        return gather(w, NamedSharding(mesh, P(*spec)))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def layer(x, w):
        up, down = gathered(w["up"], None, "model"), gathered(w["down"], "model", None)
        out: Any = {"out_sharding": P()} if kind == "explicit" else {}
        return jnp.einsum("bi,io->bo", jnp.tanh(x @ up), down, **out), None

    def fn(params, x):
        return jax.lax.scan(layer, x, params)[0]

    def loss(trained, base):
        adapters, x = trained
        bound = jaxlora.bind(base, adapters) if adapters else base
        return jnp.sum(jaxlora.lora(fn)(bound, x) ** 2)

    with jax.set_mesh(mesh) if kind == "explicit" else contextlib.nullcontext():
        params = meshes.place(plain, specs, mesh)
        quantized = jaxlora.quantize(fn, params, X, config=NF4)
        base, adapters = quantized, {}
        if targets is not None:
            config = dataclasses.replace(LORA, targets=targets)
            adapted = jaxlora.init(jax.random.key(0), fn, base, X, config=config)
            base, adapters = jaxlora.split(adapted)
        of_weight = SHAPES["up"][1] * SHAPES["up"][2] // mesh.shape["model"]
        assert largest_gather(jax.grad(loss), (adapters, X), base) == of_weight // 2  # packed
        wanted = fn(jaxlora.dequantize(quantized), X)
        assert_allclose(jax.jit(jaxlora.lora(fn))(quantized, X), wanted, atol=1e-4)


def test_codes_are_gathered_whose_scales_of_scales_are_too_few_to_be_cut():
    mesh = meshes.make("auto", "turned")

    def fn(params, x):
        w = jax.lax.with_sharding_constraint(params["w"], NamedSharding(mesh, P("model")))
        return jnp.tanh(x @ w)

    params = meshes.place(meshes.random({"w": (3584, 64)}), {"w": P("model", "data")}, mesh)
    x = jnp.cos(jnp.arange(4 * 3584.0)).reshape(4, 3584)
    quantized = jaxlora.quantize(fn, params, x, config=NF4)
    assert quantized["w"].step.shape == (2, 64)  # on four shards of the 448 blocks
    assert largest_gather(jaxlora.lora(fn), quantized, x) == 3584 * 64 // 4 // 2
    wanted = fn(jaxlora.dequantize(quantized), x)
    assert_allclose(jax.jit(jaxlora.lora(fn))(quantized, x), wanted, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True], ids=["quantized", "adapted"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_shards_of_blocks_in_shard_map(kind, double, adapted):
    mesh = meshes.make("auto", "tp")
    rows = NamedSharding(mesh, P("model", None))

    def summed(params, x):
        def of_shard(w, x):
            return jax.lax.psum(x @ w, "model"), w.T

        specs: Any = {"in_specs": (P("model", None), P(None, "model"))}
        specs |= {"out_specs": (P(), P(None, "model"))}
        return jax.shard_map(of_shard, mesh=mesh, **specs)(params["w"], x)

    params = {"w": jax.device_put(meshes.random({"w": (128, 32)})["w"], rows)}
    x = jnp.cos(jnp.arange(4 * 128.0)).reshape(4, 128)
    config = jaxlora.QuantizationConfig(kind, block_size=8, double=double, targets=("w",))
    params = jaxlora.quantize(summed, params, x, config=config)
    wanted = summed(jaxlora.dequantize(params), x)
    if adapted:
        lora = jaxlora.LoRAConfig(rank=2, targets=("w",))
        params = jaxlora.init(jax.random.key(0), summed, params, x, config=lora)
    y, turned = jaxlora.lora(summed)(params, x)
    assert_allclose(y, wanted[0], atol=1e-4)
    turned = jaxlora.merge(turned) if adapted else turned
    assert_allclose(turned, wanted[1], rtol=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["quantized", "adapted"])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_gathered_as_codes_in_shard_map(dim, adapted):
    mesh = meshes.make("auto", "tp")
    where = P("model", None) if dim == 0 else P(None, "model")

    def fn(params, x):
        def of_rows(w, x):
            whole = jax.lax.all_gather(w, "model", axis=dim, tiled=True)
            return jax.lax.psum(jnp.sum(jnp.tanh(x @ whole) ** 2), "model")

        specs: Any = {"in_specs": (where, P("model")), "out_specs": P()}
        return jax.shard_map(of_rows, mesh=mesh, **specs)(params["w"], x)

    w = jax.device_put(meshes.random({"w": (128, 64)})["w"], NamedSharding(mesh, where))
    x = jnp.cos(jnp.arange(16 * 128.0)).reshape(16, 128)
    params = jaxlora.quantize(fn, {"w": w}, x, config=NF4)
    if adapted:
        params = jaxlora.init(jax.random.key(0), fn, params, x, config=LORA)
    dense = jaxlora.merge(params) if adapted else jaxlora.dequantize(params)
    wanted = jax.value_and_grad(fn, 1)(dense, x)
    got = jax.jit(jax.value_and_grad(jaxlora.lora(fn), 1))(params, x)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, wanted)
    assert largest_gather(jax.grad(jaxlora.lora(fn), 1), params, x) == w.size // 2


def sent(params, x):
    """Each device gets the columns of its neighbour."""

    def of_shard(w, x):
        w = jax.lax.ppermute(w, "model", [(i, (i + 1) % 8) for i in range(8)])
        return x @ w

    specs: Any = {"in_specs": (P(None, "model"), P()), "out_specs": P(None, "model")}
    return jax.shard_map(of_shard, mesh=meshes.make("auto", "tp"), **specs)(params["w"], x)


def varied(params, x):
    """Each device has all of the weight, and its own rows."""
    specs: Any = {"in_specs": (P(), P("model")), "out_specs": P("model")}
    rows = jax.shard_map(lambda w, x: x @ w, mesh=meshes.make("auto", "tp"), **specs)
    return rows(params["w"], x)


def put(params, x):
    """All devices get all of the weight."""
    everywhere = NamedSharding(meshes.make("auto", "tp"), P())
    w, x = jax.device_put((params["w"], x), (everywhere, everywhere))
    return x @ w


@pytest.mark.parametrize("adapted", [False, True], ids=["quantized", "adapted"])
@pytest.mark.parametrize(
    ("fn", "operation", "spec"),
    [(sent, "ppermute", P(None, "model")), (varied, "pvary", P()), (put, "device_put", P("model"))],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_moves_a_weight_moves_its_codes(fn, operation, spec, adapted):
    w = meshes.place(meshes.random({"w": (64, 64)}), {"w": spec}, meshes.make("auto", "tp"))
    x = jnp.cos(jnp.arange(8 * 64.0)).reshape(8, 64)
    params = jaxlora.quantize(fn, w, x, config=NF4)
    if adapted:
        params = jaxlora.init(jax.random.key(0), fn, params, x, config=LORA)
        base, adapters = jaxlora.split(params)
        params = jaxlora.bind(base, jax.tree.map(lambda x: x + 0.1, adapters))
    wanted = fn(jaxlora.merge(params) if adapted else jaxlora.dequantize(params), x)
    assert_allclose(jax.jit(jaxlora.lora(fn))(params, x), wanted, atol=1e-4)
    program = str(jax.make_jaxpr(jaxlora.lora(fn))(params, x))
    moved = re.findall(rf":(\w+)\[([\d,]*)\]\S* = {operation}\b", program)
    sizes = {(dtype, math.prod(map(int, filter(None, n.split(","))))) for dtype, n in moved}
    of_weight = 64 * 64 // (8 if operation == "ppermute" else 1)
    assert ("u8", of_weight // 2) in sizes
    assert not any(dtype == "f32" and size >= of_weight // 2 for dtype, size in sizes)
