"""Starts from the weight, against NumPy, and the way back to adapters of the weight as it was."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention import PARAMS, X, model
from cases import normal
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
import jaxlora.nnx
from jaxlora import initializers
from jaxlora.linalg import svd

pytestmark = pytest.mark.once

EVERY = ["pissa", initializers.pissa(8), "milora", "olora"]
every = pytest.mark.parametrize("initializer", EVERY, ids=["pissa", "fast", "milora", "olora"])


def init(initializer, params: Any = PARAMS, targets: Any = "all-linear", **config) -> Any:
    config = {"rank": 2, "alpha": 6.0, "targets": targets, "initializer": initializer} | config
    config = jaxlora.LoRAConfig(**config)
    return jaxlora.init(jax.random.key(0), model, params, X, config=config)


def trained(params):
    """Return adapters that have moved, their base, and the adapters as they were."""
    base, initial = jaxlora.split(params)
    leaves, treedef = jax.tree.flatten(initial)
    moved = [leaf + 0.1 * normal(20 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return base, initial, treedef.unflatten(moved)


def product(weight, rank, name):
    """Return what NumPy takes out of a matrix ``(in, out)`` whose scaling is 3."""
    weight = np.asarray(weight, np.float64)
    if name == "olora":
        q, r = np.linalg.qr(weight.T)
        return 3 * (q[:, :rank] @ r[:rank]).T
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    kept = slice(-rank, None) if name == "milora" else slice(rank)
    return (u[:, kept] * s[kept]) @ v[kept]


@every
def test_output_does_not_change(initializer):
    params, plain = init(initializer), model(PARAMS, X)
    assert np.abs(params["query"].b).min() > 0
    y = jaxlora.lora(model, strict=True)(params, X)
    assert_allclose(y, plain, rtol=1e-4, atol=1e-4 * float(jnp.abs(plain).max()))


@every
def test_what_is_taken_out_is_what_numpy_finds(initializer):
    params = init(initializer)
    name = params["query"].changed
    shapes = {"query": (1, 8, 8), "out": (1, 8, 8), "experts": (3, 8, 6)}
    for path, shape in shapes.items():
        node, weight = params[path], PARAMS[path].reshape(shape)
        wanted = np.stack([product(w, 2, name) for w in weight])
        assert_allclose(node.delta().reshape(shape), wanted, rtol=1e-3, atol=1e-4)
        assert_allclose(node.base.reshape(shape), weight - wanted, rtol=1e-3, atol=1e-4)
        if name != "olora":  # each factor has the root of the singular values
            a, b = node.a.reshape(shape[0], -1, 2), node.b.reshape(shape[0], 2, -1)
            assert_allclose((a**2).sum(1), (b**2).sum(2), rtol=1e-4)


def test_a_starts_at_zero_and_b_at_random():
    params = init("zero_a", rank=4)
    assert not params["query"].changed
    assert_array_equal(params["query"].base, PARAMS["query"])
    for path in ("query", "experts"):
        assert_array_equal(params[path].a, jnp.zeros_like(params[path].a))
        b = np.asarray(params[path].b)
        assert 0.4 < np.abs(b).max() <= 0.5
        assert len(np.unique(b)) == b.size  # entries of a stack have draws of their own
    assert_array_equal(jaxlora.lora(model)(params, X), model(PARAMS, X))


def test_parts_start_from_the_part():
    params = init("pissa", targets=("experts[0:2]", "experts[2:, :, 0:3]"))
    left = params["experts"].base
    for block in (np.s_[0], np.s_[1], np.s_[2, :, 0:3]):
        wanted = product(PARAMS["experts"][block], 2, "pissa")
        assert_allclose(left[block], PARAMS["experts"][block] - wanted, rtol=1e-3, atol=1e-4)
    assert_array_equal(left[2, :, 3:], PARAMS["experts"][2, :, 3:])
    assert_allclose(jaxlora.merge(params)["experts"], PARAMS["experts"], rtol=1e-4, atol=1e-5)


def test_base_keeps_its_dtype():
    params, x = jax.tree.map(lambda w: w.astype(jnp.bfloat16), ({"w": PARAMS["experts"][0]}, X))
    config = jaxlora.LoRAConfig(rank=2, initializer="pissa")
    adapted = jaxlora.init(jax.random.key(0), lambda p, x: x @ p["w"], params, x, config=config)
    assert (adapted["w"].base.dtype, adapted["w"].a.dtype) == (jnp.bfloat16, jnp.float32)
    merged = jaxlora.merge(adapted)["w"]
    assert_allclose(*(w.astype("float32") for w in (merged, params["w"])), rtol=0.02, atol=0.02)


@every
def test_adapters_of_a_changed_base_become_adapters_of_the_weights_as_they_were(initializer):
    base, initial, adapters = trained(init(initializer))
    plain = jaxlora.algebra.rebase(adapters, initial, base=PARAMS)
    assert {(adapter.rank, adapter.alpha) for adapter in plain.values()} == {(4, 12.0)}
    changed = jaxlora.merge(jaxlora.bind(base, adapters))
    merged = jaxlora.merge(jaxlora.bind(PARAMS, plain))
    for path, weight in changed.items():
        assert_allclose(merged[path], weight, rtol=1e-4, atol=1e-5)


def test_adapters_of_other_strengths_become_plain():
    base, initial, adapters = trained(init("pissa"))
    stronger = jaxlora.algebra.truncate(adapters, rank=1)  # of another scaling and rank
    plain = jaxlora.algebra.rebase(stronger, initial, base=PARAMS)
    merged = jaxlora.merge(jaxlora.bind(PARAMS, plain))
    for path, weight in jaxlora.merge(jaxlora.bind(base, stronger)).items():
        assert_allclose(merged[path], weight, rtol=1e-4, atol=1e-5)


def test_loading_on_the_weights_as_they_were_is_refused_and_told(tmp_path):
    base, initial, adapters = trained(init("pissa"))
    jaxlora.save_adapters(tmp_path / "changed", adapters)
    with pytest.raises(ValueError, match=r"the base that pissa has left is needed, or .*rebase"):
        jaxlora.load_adapters(tmp_path / "changed", base=PARAMS)
    loaded = jaxlora.load_adapters(tmp_path / "changed", base=base)
    assert loaded["query"].changed == "pissa"
    jaxlora.save_adapters(tmp_path / "plain", jaxlora.algebra.rebase(loaded, initial, base=PARAMS))
    assert jaxlora.load_adapters(tmp_path / "plain", base=PARAMS)["query"].changed == ""


def test_module_that_is_adapted_keeps_its_weights(key):
    module = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    kernel, x = module.kernel.get_value(), X[0]
    config = jaxlora.LoRAConfig(rank=2, initializer="pissa")
    adapted = jaxlora.nnx.adapt(nnx.Rngs(1), module, x, config=config)
    assert_array_equal(module.kernel.get_value(), kernel)
    assert np.abs(adapted.model.kernel.get_value() - kernel).max() > 0.1
    assert_allclose(adapted(x), module(x), rtol=1e-4, atol=1e-5)
    assert adapted.adapters()["kernel"].changed == "pissa"


def test_orthogonal_columns_are_orthonormal():
    params = init("orthogonal", targets=("query",))
    a = np.asarray(params["query"].a)
    assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
    assert not params["query"].b.any()


def test_randomized_decomposition_is_nearly_the_best(key):
    """Of a matrix whose singular values fall slowly, within 1 % of the error of the best."""
    u, _ = np.linalg.qr(np.asarray(normal(0, 96, 64)))
    v, _ = np.linalg.qr(np.asarray(normal(1, 64, 64)))
    matrix = jnp.asarray((u * np.arange(1, 65) ** -0.5) @ v.T, jnp.float32)
    u, s, v = svd.randomized(key, matrix, 8, 8)
    error = jnp.linalg.norm(matrix - (u * s[None]) @ v)
    best = np.linalg.norm(np.arange(9, 65) ** -0.5)
    assert best <= error * 1.0001 < 1.01 * best
    assert_allclose(u.T @ u, np.eye(8), atol=1e-5)
    assert_allclose(s, np.arange(1, 9) ** -0.5, rtol=0.02)


def test_start_of_a_users_own():
    """Half of the weight's first rows: ``a`` picks the rows, ``b`` holds them."""

    def first_rows(key, weight, rank, scaling):
        return jnp.eye(len(weight), rank), 0.5 * weight[:rank] / scaling

    params = init(initializers.FromWeight("rows", first_rows), targets=("experts",))
    wanted = PARAMS["experts"].at[:, :2].multiply(0.5)
    assert_allclose(params["experts"].base, wanted, rtol=1e-5)


def test_shapes_and_values_without_a_decomposition_are_refused():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    with pytest.raises(ValueError, match="'pissa' starts from values: 'query' is ShapeDtypeStruct"):
        init("pissa", shapes, targets=("query",))
    broken = PARAMS | {"out": PARAMS["out"].at[0, 0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="'pissa' needs finite values: 'out' holds NaN or inf"):
        init("pissa", broken, targets=("out",))
    with pytest.raises(ValueError, match="iterations must be at least 0: got -1"):
        initializers.pissa(-1)


def test_adapters_that_cannot_become_plain_are_refused():
    _, initial, adapters = trained(init("pissa"))
    fresh = jaxlora.split(init("uniform"))[1]
    with pytest.raises(ValueError, match="the adapter of 'experts' is plain: nothing changed"):
        jaxlora.algebra.rebase(fresh, fresh, base=PARAMS)
    other = init("pissa", {name: weight + 1 for name, weight in PARAMS.items()})
    with pytest.raises(ValueError, match="must be of one base: 'experts' has the hashes"):
        jaxlora.algebra.rebase(adapters, jaxlora.split(other)[1], base=PARAMS)
    with pytest.raises(ValueError, match="must be of one base: 'experts' has"):
        jaxlora.algebra.rebase(adapters, fresh, base=PARAMS)
    with pytest.raises(ValueError, match="must have the same paths: 'experts' is in one"):
        jaxlora.algebra.rebase(adapters, {"query": initial["query"]}, base=PARAMS)
    other = {k: v for k, v in PARAMS.items() if k != "out"}
    with pytest.raises(ValueError, match="the base has no leaf 'out'"):
        jaxlora.algebra.rebase(adapters, initial, base=other)
    with pytest.raises(ValueError, match="for a weight of shape"):
        jaxlora.algebra.rebase(adapters, initial, base=PARAMS | {"out": normal(0, 3, 4, 8)})


def test_start_inside_of_jit_is_that_outside():
    inside = jax.jit(lambda params: init("pissa", params))(PARAMS)
    for got, wanted in zip(jax.tree.leaves(inside), jax.tree.leaves(init("pissa")), strict=True):
        assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    structures = jax.tree.structure(inside), jax.tree.structure(init("pissa"))
    assert structures[0] == structures[1]


def test_adapters_of_many_layers_become_plain_whatever_their_order():
    params: Any = {"layers": [normal(i, 8, 8) for i in range(12)]}

    def deep(params, x):
        for w in params["layers"]:
            x = jnp.tanh(x @ w)
        return x

    config = jaxlora.LoRAConfig(rank=2, initializer="pissa")
    adapted = jaxlora.init(jax.random.key(0), deep, params, X, config=config)
    base, initial = jaxlora.split(adapted)
    adapters = jax.tree.map(lambda x: x + 0.1, initial)  # sorts the paths
    assert list(adapters) != list(initial)
    merged = jaxlora.merge(
        jaxlora.bind(params, jaxlora.algebra.rebase(adapters, initial, base=params))
    )
    for got, wanted in zip(
        merged["layers"], jaxlora.merge(jaxlora.bind(base, adapters))["layers"], strict=True
    ):
        assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the base must be that given to init: 'layers/0' is what"):
        jaxlora.algebra.rebase(adapters, initial, base=base)


def test_factors_of_other_shapes_are_refused():
    turned = initializers.FromWeight("turned", lambda k, w, r, s: (w[:, :r].T, w[:r].T))
    with pytest.raises(ValueError, match=r"'turned' must return a and b of the shapes .* 'query'"):
        init(turned, targets=("query",))


def test_weights_of_equal_shapes_share_a_program():
    count = 0

    def factors(key, weight, rank, scaling):
        nonlocal count
        count += 1
        return weight[:, :rank], weight[:rank]

    params: Any = {"layers": [normal(i, 8, 8) for i in range(4)]}
    config = jaxlora.LoRAConfig(rank=2, initializer=initializers.FromWeight("own", factors))
    model = lambda p, x: sum(x @ w for w in p["layers"])  # noqa: E731
    jaxlora.init(jax.random.key(0), model, params, X, config=config)
    assert count == 4 + 1  # its shapes for each, its program once


def test_ranks_by_variance_keep_the_largest_shares():
    moments = {
        "even": jnp.eye(6)[None],
        "stack": jnp.stack([jnp.diag(4.0 ** -jnp.arange(6.0))] * 2),
    }
    shares = {name: np.sort(np.diagonal(np.asarray(m[0])))[::-1] for name, m in moments.items()}
    shares = {name: share / share.sum() for name, share in shares.items()}
    ranks = initializers.eva_ranks(moments, 2)
    assert sum(ranks[name] * len(moments[name]) for name in ranks) == 2 * 3
    least = min(shares[name][rank - 1] for name, rank in ranks.items())
    assert all(shares[name][rank] <= least for name, rank in ranks.items())
    assert initializers.eva_ranks(moments, 2, rho=1) == {"even": 2, "stack": 2}
    uneven = {"even": jnp.eye(60)[None], "steep": moments["stack"][:1]}
    assert initializers.eva_ranks(uneven, 1) == {"steep": 2}
    for rank, rho in [(0, 2.0), (1, 0.5), (1, float("nan"))]:
        with pytest.raises(ValueError, match=r"(rank|rho) must be .*at least 1"):
            initializers.eva_ranks(moments, rank, rho=rho)
