"""Magnitudes (DoRA): the laws on every case, NumPy, and what cannot have one."""

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from cases.base import trained as drawn
from numpy.testing import assert_allclose
from test_laws import assert_close, loss, parameters

import jaxlora
from jaxlora.weights import magnitude

pytestmark = pytest.mark.once


def whole(case) -> Any:
    """Return adapted parameters with magnitudes, or skip what has parts of columns."""
    targets = case.targets if isinstance(case.targets, str) else [*case.targets]
    config = jaxlora.LoRAConfig(rank=case.rank, alpha=3.0, targets=targets, magnitude=True)
    try:
        return jaxlora.init(jax.random.key(0), case.fn, case.params, *case.args, config=config)
    except ValueError as error:
        if "only parts with whole columns" not in str(error):
            raise
        pytest.skip("a part of a column has no magnitude")


def trained(params) -> Any:
    base, adapters = jaxlora.split(params)
    moved = drawn(jax.random.key(0), adapters)
    return jaxlora.bind(base, moved)


@pytest.mark.parametrize("name", ["linen_attention", "nnx_transformer", "half_precision_base"])
def test_fresh_magnitudes_leave_the_output_equal(name):
    case = cases.CASES[name]()
    got = jaxlora.lora(case.fn)(whole(case), *case.args)
    assert_close(got, case.fn(case.params, *case.args), case.epsilon, ulps=16)


@pytest.mark.parametrize("make", parameters(cases.CASES))
@pytest.mark.filterwarnings("ignore::jaxlora.MaterializationWarning")
def test_output_and_gradients_equal_merged(make):
    case = make()
    base, adapters = jaxlora.split(trained(whole(case)))

    def low_rank(adapters, args):
        return loss(jaxlora.lora(case.fn), jaxlora.bind(base, adapters), *args)

    def merged(adapters, args):
        return loss(case.fn, jaxlora.merge(jaxlora.bind(base, adapters)), *args)

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1), allow_int=True)
    got, wanted = (jax.jit(grad(fn))(adapters, case.args) for fn in (low_rank, merged))
    assert_close(got, wanted, case.epsilon, ulps=256)


def node(**config) -> Any:
    """Return a node whose weight is a stack, with several in and out axes."""

    def model(params, x):
        return jnp.einsum("ebij,eiojp->ebop", x, params["w"])

    params, x = {"w": normal(0, 3, 4, 5, 2, 6)}, normal(1, 3, 7, 4, 2)
    config = jaxlora.LoRAConfig(**{"rank": 2, "alpha": 6.0, "magnitude": True} | config)
    return trained(jaxlora.init(jax.random.key(0), model, params, x, config=config))["w"]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_norms_are_those_that_numpy_finds(platform, as_on):
    as_on(platform)
    weight = node()
    assert weight.magnitude.shape == (3, 5, 6)
    a, b = (np.asarray(x, np.float64) for x in (weight.a, weight.b))
    product = np.einsum("eijr,erop->eiojp", a, b)
    total = np.asarray(weight.base, np.float64) + 3 * product
    assert_allclose(
        magnitude.norms(weight.base, weight.term), np.sqrt((total**2).sum((1, 3))), rtol=1e-4
    )


def test_merged_columns_have_the_norms_of_their_magnitudes():
    weight = node()
    merged = np.asarray(jaxlora.merge({"w": weight})["w"])
    assert_allclose(np.sqrt((merged**2).sum((1, 3))), np.abs(weight.magnitude), rtol=1e-4)


def test_no_product_of_the_size_of_the_weight_is_formed():
    weight = node()
    norms = jax.jit(magnitude.norms).trace(weight.base, weight.term)
    program = norms.lower(lowering_platforms=("cpu",)).as_text()
    results = [line.split("->")[1] for line in program.splitlines() if "dot_general" in line]
    assert len(results) == 3
    assert not any("4x" in result for result in results)  # the first of its in axes


def test_no_wide_array_is_kept_for_the_gradient_of_a_magnitude():
    params = {name: jnp.ones((4, 64, 64), jnp.bfloat16) for name in "qv"}
    x, config = jnp.ones((512, 64), jnp.bfloat16), jaxlora.LoRAConfig(rank=2, magnitude=True)

    def layer(x, weights):
        return jnp.sin(x @ weights["q"]) @ weights["v"], None

    def model(params, x):
        return jnp.sum(jax.lax.scan(layer, x, params)[0])

    params = jaxlora.init(jax.random.key(0), model, params, x, config=config)
    base, adapters = jaxlora.split(params)
    step = jax.grad(lambda adapters, x: jaxlora.lora(model)(jaxlora.bind(base, adapters), x))
    stacked: list[Any] = [
        var.aval
        for eqn in jax.make_jaxpr(step)(adapters, x).eqns
        if eqn.primitive.name == "scan"
        for var in eqn.outvars
    ]
    assert stacked
    assert not [x for x in stacked if x.shape == (4, 512, 64) and x.dtype == jnp.float32]


def linear(params, x):
    return x @ params["w"]


def start(rank=2, **config) -> Any:
    config = jaxlora.LoRAConfig(rank=rank, magnitude=True, **config)
    params = {"w": normal(0, 8, 6)}
    return jaxlora.init(jax.random.key(0), linear, params, normal(1, 5, 8), config=config)


def test_column_that_is_zero_stays_and_can_be_trained():
    params = {"w": normal(0, 8, 6).at[:, 2].set(0)}
    x = normal(1, 5, 8)
    config = jaxlora.LoRAConfig(rank=2, magnitude=True)
    params = jaxlora.init(jax.random.key(0), linear, params, x, config=config)
    base, adapters = jaxlora.split(params)

    def loss(adapters):
        return jaxlora.lora(linear)(jaxlora.bind(base, adapters), x).sum()

    assert_allclose(jaxlora.lora(linear)(params, x)[:, 2], 0)
    gradient: Any = jax.grad(loss)(adapters)["w"]
    assert np.isfinite(np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])).all()
    assert np.abs(gradient.b[:, 2]).min() > 0


@pytest.mark.parametrize("initializer", ["uniform", "pissa"])
def test_adapters_with_magnitudes_are_saved_and_turned_plain(tmp_path, initializer):
    base, initial = jaxlora.split(start(initializer=initializer))
    adapters = jaxlora.split(trained(jaxlora.bind(base, initial)))[1]
    jaxlora.save_adapters(tmp_path / "a", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "a", base=base)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    assert_close(loaded, adapters, 0, 0)
    if initializer == "pissa":
        plain = jaxlora.algebra.rebase(adapters, initial, base={"w": normal(0, 8, 6)})
        merged = jaxlora.merge(jaxlora.bind({"w": normal(0, 8, 6)}, plain))
        assert_allclose(
            merged["w"], jaxlora.merge(jaxlora.bind(base, adapters))["w"], rtol=1e-3, atol=1e-4
        )


def test_frozen_optimizer_trains_the_magnitude_at_its_own_rate():
    params = start()
    tx = jaxlora.freeze(optax.chain(optax.sgd(1.0), jaxlora.optim.scale_rates(magnitude=0.25)))
    ones = jax.tree.map(jnp.ones_like, params)
    updates: Any = tx.update(ones, tx.init(params), params)[0]
    assert_allclose(updates["w"].magnitude, -0.25)
    assert_allclose(updates["w"].a, -1.0)
    assert not updates["w"].base.any()
    assert jaxlora.summary(params).trainable == params["w"].a.size + params["w"].b.size + 6


def test_padded_and_truncated_adapters_keep_their_magnitude():
    base, adapters = jaxlora.split(trained(start()))
    wanted = jaxlora.merge(jaxlora.bind(base, adapters))["w"]
    for changed in (jaxlora.algebra.pad(adapters, 4), jaxlora.algebra.truncate(adapters, 2)):
        merged = jaxlora.merge(jaxlora.bind(base, changed))["w"]
        assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)
    delta = jaxlora.algebra.delta(jaxlora.bind(base, adapters), "w")
    assert_allclose(delta, wanted - base["w"], rtol=1e-4, atol=1e-5)


def test_what_has_no_meaning_with_a_magnitude_is_refused():
    base, adapters = jaxlora.split(start())
    params = jaxlora.bind(base, adapters)
    for call in (
        lambda: jaxlora.algebra.scale(adapters, 2.0),
        lambda: jaxlora.algebra.add(adapters, adapters),
    ):
        with pytest.raises(ValueError, match="the adapter of 'w' has a magnitude"):
            call()
    with pytest.raises(ValueError, match="the magnitude of 'w' cannot be unmerged"):
        jaxlora.unmerge(jaxlora.merge(params), adapters)
    with pytest.raises(
        ValueError, match=r"only parts with whole columns, all along .* have magnitudes: .*0:4"
    ):
        start(targets=("w[0:4]",))
    shapes = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    config = jaxlora.LoRAConfig(rank=2, magnitude=True)
    with pytest.raises(ValueError, match="a magnitude starts from values: 'w' is"):
        jaxlora.init(jax.random.key(0), linear, shapes, normal(1, 5, 8), config=config)
    wrong = {"w": jaxlora.Adapter(**{**vars(adapters["w"]), "magnitude": jnp.ones(5)})}
    with pytest.raises(ValueError, match=r"the magnitude of 'w' must have the shape \(6,\)"):
        jaxlora.bind(base, wrong)


def test_explain_counts_norms_and_gains():
    x, plain = normal(1, 5, 8), jaxlora.LoRAConfig(rank=2)
    params = jaxlora.init(jax.random.key(0), linear, {"w": normal(0, 8, 6)}, x, config=plain)
    costs = [jaxlora.explain(linear, p, x).costs["w"].flops for p in (params, start())]
    crossed, gram, of_b, gains = 2 * 2 * 8 * 6, 2 * 2 * 2 * 8, 2 * 2 * 2 * 6, 5 * 6
    assert costs[1] - costs[0] > crossed + gram + of_b + gains


def test_magnitude_of_narrow_factors_is_not_rounded():
    params = start(dtype=jnp.bfloat16)
    assert (params["w"].a.dtype, params["w"].magnitude.dtype) == (jnp.bfloat16, jnp.float32)
    x = normal(1, 5, 8)
    assert_allclose(jaxlora.lora(linear)(params, x), x @ normal(0, 8, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("initializer", "is_quantized"), [("uniform", False), ("pissa", False), ("uniform", True)]
)
def test_some_layers_of_a_stack_have_magnitudes(initializer, is_quantized, tmp_path):
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params, x = {"w": normal(0, 5, 8, 8)}, normal(1, 3, 8)
    fields: dict[str, Any] = {"layers": (0, 2, 3), "magnitude": True}
    config = jaxlora.LoRAConfig(rank=2, initializer=initializer, **fields)
    if is_quantized:
        how = jaxlora.QuantizationConfig(block_size=4)
        params = jaxlora.quantize(fn, params, x, config=how)
    adapted = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    plain = jaxlora.dequantize(params) if is_quantized else params
    assert_allclose(jaxlora.lora(fn)(adapted, x), fn(plain, x), atol=1e-5)
    base, adapters = jaxlora.split(adapted)
    assert {name: adapter.magnitude.shape for name, adapter in adapters.items()} == {
        "w[0:1, :, :]": (1, 8),
        "w[2:4, :, :]": (2, 8),
    }
    moved = drawn(jax.random.key(1), adapters)

    def low_rank(adapters):
        return loss(jaxlora.lora(fn, strict=True), jaxlora.bind(base, adapters), x)

    def merged(adapters):
        return loss(fn, jaxlora.merge(jaxlora.bind(base, adapters)), x)

    got, wanted = (jax.jit(jax.value_and_grad(f))(moved) for f in (low_rank, merged))
    assert_close(got, wanted, 1.2e-7, ulps=512)
    after = jaxlora.merge(jaxlora.bind(base, moved))["w"]
    assert_allclose(after[jnp.array([1, 4])], plain["w"][jnp.array([1, 4])], rtol=1e-6)
    norms = jnp.linalg.norm(after[2:4], axis=1)
    assert_allclose(norms, jnp.abs(moved["w[2:4, :, :]"].magnitude), rtol=1e-5)
    jaxlora.save_adapters(tmp_path / "adapters", moved, base=base)
    loaded = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(moved), strict=True):
        assert_allclose(a, b)
