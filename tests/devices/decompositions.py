"""Eight devices: what is computed of sharded adapters is what it is of whole ones."""

import jax
import numpy as np
import pytest
from jax import P
from numpy.testing import assert_allclose

import jaxlora
from devices import meshes
from jaxlora import algebra, analysis
from jaxlora.weights import sharding
from jaxlora.weights.roles import Roles, factor_axes

SHAPES = {"up": (64, 32), "heads": (32, 4, 8), "experts": (4, 64, 16)}
SPECS = {
    "up": P("data", "model"),
    "heads": P("data", None, "model"),
    "experts": P("model", "data", None),
}
STACKS = {"up": (), "heads": (), "experts": (0,)}


def adapters_of(base, rank, seed):
    """Return adapters with no factor zero, placed as the axes of the base that they carry."""
    found = {}
    for path, weight in base.items():
        stack = STACKS[path]
        count = len(stack)
        roles = Roles(stack, (count,), tuple(range(count + 1, weight.ndim)))
        shapes = roles.factor_shapes(weight.shape, rank)
        axes = factor_axes(roles)
        draw = np.random.default_rng([seed, *weight.shape])
        factors = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
        known = sharding.concrete(weight)
        places = [known and sharding.along(known, kept) for kept in axes[:2]]
        a, b = (jax.device_put(x, place) for x, place in zip(factors, places, strict=True))
        found[path] = jaxlora.Adapter(a, b, roles, alpha=rank, shape=weight.shape)
    return found


WHOLE = meshes.random(SHAPES)
CALLS = {
    "spectrum": lambda base, one, other: analysis.spectrum(one, base),
    "similarity": lambda base, one, other: analysis.similarity(one, other).found,
    "of the weight": lambda base, one, other: analysis.similarity(one, base, "out").found,
    "amplification": lambda base, one, other: analysis.amplification(base, one).norms,
    "intruders": lambda base, one, other: analysis.intruders(base, one, 3),
    "without": lambda base, one, other: deltas(base, analysis.without_intruders(base, one, 3)),
    "explained": lambda base, one, other: analysis.explained(base["up"], (1, 2)),
    "truncate": lambda base, one, other: deltas(base, algebra.truncate(one, 1)),
    "add": lambda base, one, other: deltas(base, algebra.add(one, other)),
    "svd": lambda base, one, other: deltas(
        base, algebra.combine([one, other], [1.0, 0.5], algebra.Svd(rank=2))
    ),
    "ties": lambda base, one, other: deltas(
        base, algebra.combine([one, one], [1.0, 0.5], algebra.Ties(0.5))
    ),
    "extract": lambda base, one, other: deltas(
        base, algebra.extract(base, jaxlora.merge(jaxlora.bind(base, one)), 2).adapters
    ),
}


def deltas(base, adapters):
    """Return dense products, after a look at where the factors are."""
    for path, adapter in adapters.items():
        if (known := sharding.concrete(base[path])) is None:
            continue
        for name, axes in adapter.axes().items():
            if (factor := getattr(adapter, name)) is not None:
                place = sharding.along(known, axes)
                assert factor.sharding.is_equivalent_to(place, factor.ndim), (path, name)
    return {path: adapter.delta(base[path]) for path, adapter in adapters.items()}


@pytest.fixture(scope="module", params=[*meshes.KINDS])
def placed(request):
    return meshes.place(WHOLE, SPECS, meshes.make(request.param))


@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_whole_arrays(placed, name):
    wanted, got = (
        CALLS[name](base, adapters_of(base, 3, 0), adapters_of(base, 2, 1))
        for base in (WHOLE, placed)
    )
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_results_of_a_stack_stay_sharded_as_it_is(placed):
    found = analysis.spectrum(adapters_of(placed, 3, 0), placed)["experts"]
    assert meshes.is_placed(found.values, "model", None)
    assert meshes.is_placed(found.weight_norm, "model")


def test_rows_of_factors_are_not_gathered():
    """What is sent of a factor with rows on every device is what its blocks have left."""
    tall = meshes.random({"up": (1024, 64)})
    base = meshes.place(tall, {"up": SPECS["up"]}, meshes.make("auto"))
    adapters = adapters_of(base, 4, 0)
    sent = meshes.collectives(lambda adapters: analysis.spectrum(adapters)["up"].values, adapters)
    gathered = [size for name, size in sent if name == "all-gather"]
    assert gathered
    assert all(np.prod(size) <= adapters["up"].a.size // 4 for size in gathered)
