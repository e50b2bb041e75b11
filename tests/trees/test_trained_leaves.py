"""Leaves that are trained whole, beside factors: norms, biases, a new head."""

import re
from typing import Any

import flax.linen as nn
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
from jaxlora import Replacement, TrainedLeaf


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(x)
        x = nn.gelu(nn.Dense(12, name="up", bias_init=nn.initializers.normal())(x))
        return nn.Dense(4, name="head", bias_init=nn.initializers.normal())(x)


MODEL, X = Block(), normal(0, 5, 8)
PARAMS: Any = MODEL.init(jax.random.key(0), X)
NORM = ["params/norm/bias", "params/norm/scale"]


def init(params=PARAMS, **config) -> Any:
    config = {"rank": 2, "targets": ("up/kernel",), "train": ("norm",)} | config
    config = jaxlora.LoRAConfig(**config)
    return jaxlora.init(jax.random.key(0), MODEL.apply, params, X, config=config)


def moved(params, by=0.1) -> Any:
    """Return the base, and adapters all of whose elements have moved."""
    base, adapters = jaxlora.split(params)
    return base, jax.tree.map(lambda x: x + by, adapters)


def whole(adapters):
    return sorted(path for path, x in adapters.items() if isinstance(x, Replacement))


def test_fresh_leaves_are_those_of_the_base():
    params = init()
    leaf = params["params"]["norm"]["scale"]
    assert isinstance(leaf, TrainedLeaf)
    assert_array_equal(leaf.value, leaf.base)
    assert_array_equal(jaxlora.lora(MODEL.apply, strict=True)(params, X), MODEL.apply(PARAMS, X))


def test_values_stand_in_the_place_of_the_leaves_and_have_gradients():
    base, adapters = moved(init(train=("norm", "head"), bias="lora_only"))
    assert whole(adapters) == sorted(
        [*NORM, "params/head/bias", "params/head/kernel", "params/up/bias"]
    )

    def loss(adapters, apply):
        return jnp.sum(jnp.tanh(apply(jaxlora.bind(base, adapters), X)))

    def merged(params, x):
        return MODEL.apply(jaxlora.merge(params), x)

    got = jax.value_and_grad(loss)(adapters, jaxlora.lora(MODEL.apply, strict=True))
    wanted = jax.value_and_grad(loss)(adapters, merged)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_one_tree_trains_factors_and_leaves_and_nothing_else():
    params, tx = init(), jaxlora.freeze(optax.sgd(0.5))
    updates: Any = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]
    plain, adapters = jaxlora.split(updates)
    assert not any(leaf.any() for leaf in jax.tree.leaves(plain))
    assert all((x == -0.5).all() for x in jax.tree.leaves(adapters))
    only = jaxlora.freeze(optax.sgd(0.5), train=("value",))
    updates = only.update(jax.tree.map(jnp.ones_like, params), only.init(params), params)[0]
    assert not updates["params"]["up"]["kernel"].b.any()
    assert updates["params"]["norm"]["scale"].value.all()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"train": (), "bias": "none"}, []),
        ({"train": (), "bias": "lora_only"}, ["params/up/bias"]),
        (
            {"train": (), "bias": "all"},
            ["params/head/bias", "params/norm/bias", "params/up/bias"],
        ),
        ({"train": ".*(scale|head/bias)"}, ["params/head/bias", "params/norm/scale"]),
    ],
)
def test_leaves_are_found_by_name(options, wanted):
    assert whole(jaxlora.split(init(**options))[1]) == wanted


def test_leaves_are_saved_and_loaded_and_merged(tmp_path):
    base, adapters = moved(init())
    jaxlora.save_adapters(tmp_path / "a", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "a", base=base)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    merged = jaxlora.merge(jaxlora.bind(base, loaded))
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert_allclose(merged["params"]["norm"]["scale"], PARAMS["params"]["norm"]["scale"] + 0.1)
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    with pytest.raises(ValueError, match="'params/norm/bias' holds other values"):
        jaxlora.load_adapters(tmp_path / "a", base=other)


def test_leaves_are_counted_as_whole():
    text = str(jaxlora.summary(init()))
    assert re.search(r"params/norm/scale +\(8,\) +itself +8 +16 ", text)
    assert jaxlora.summary(init()).trainable == 2 * (8 + 12) + 2 * 8


def test_explain_and_dropout_take_trees_with_leaves():
    params = init()
    assert "params/up/kernel" in str(jaxlora.explain(MODEL.apply, params, X))
    dropped = jaxlora.dropout(params, jax.random.key(0), 0.5)
    y: Any = jaxlora.lora(MODEL.apply)(dropped, X)
    assert y.shape == (5, 4)


def test_leaves_of_a_module_are_trained():
    module = nnx.Sequential(nnx.LayerNorm(8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    config = jaxlora.LoRAConfig(rank=2, train=("scale",), bias="lora_only")
    adapted = jaxlora.nnx.adapt(nnx.Rngs(2), module, X, config=config)
    assert_array_equal(adapted(X), module(X))
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.5), wrt=jaxlora.nnx.Factor)

    @nnx.jit
    def step(adapted, optimizer):
        of_factors = nnx.DiffState(0, jaxlora.nnx.Factor)
        gradients = nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=of_factors)(adapted)
        optimizer.update(adapted, gradients)

    step(adapted, optimizer)
    changed = adapted.adapters()
    names = whole(changed)
    assert [name.rpartition("/")[2] for name in names] == ["scale", "bias"]
    plain = jaxlora.nnx.merge(adapted)
    assert_allclose(adapted(X), plain(X), rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(adapted(X) - module(X))).max() > 0.01


def test_adapters_stay_what_they_are_in_algebra_where_that_has_a_meaning():
    _, adapters = moved(init(initializer="pissa"))
    for changed in (
        jaxlora.algebra.pad(adapters, 4),
        jaxlora.algebra.truncate(adapters, 1),
        jaxlora.to_plain(adapters, adapters, base=PARAMS),
    ):
        assert_array_equal(changed[NORM[0]].value, adapters[NORM[0]].value)
    scale, add = jaxlora.algebra.scale, jaxlora.algebra.add
    for call in (lambda: scale(adapters, 2.0), lambda: add(adapters)):
        with pytest.raises(ValueError, match="the leaf 'params/norm/bias' is trained whole"):
            call()


def test_mistakes_are_named():
    base, adapters = moved(init())
    integers = {"params": PARAMS["params"] | {"count": jnp.arange(3)}}
    for make, message in [
        (
            lambda: init(train=("nrom",)),
            "'nrom' is to be trained, but is no leaf; nearest: 'params/norm",
        ),
        (lambda: init(train=("up",)), "'up' is to be trained, and 'params/up/kernel' is adapted"),
        (lambda: init(train=("norm/scale[0:2]",)), "train must name whole weights"),
        (lambda: init(train="("), "train is no regular expression"),
        (lambda: init(integers, train=("count",)), "only floating leaves can be trained: .*count"),
        (lambda: init(bias="some"), r"bias must be one of \(.*'lora_only'\): got 'some'"),
        (lambda: init(init()), "the leaf 'params/norm/bias' is adapted already"),
        (
            lambda: jaxlora.unmerge(base, {NORM[0]: adapters[NORM[0]]}),
            "the leaf of 'params/norm/bias' cannot be unmerged",
        ),
        (
            lambda: jaxlora.bind(base, {"params/up/kernel": adapters[NORM[0]]}),
            r"the replacement of 'params/up/kernel' is for a leaf of shape \(8,\): got \(8, 12\)",
        ),
        (
            lambda: jaxlora.merge(
                {"w": TrainedLeaf(jnp.ones(2), Replacement(jnp.array([1, jnp.nan]), (2,)))}
            ),
            "the trained leaf 'w' is not finite",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_model_without_biases_is_refused():
    def linear(params, x):
        return x @ params["w"]

    config = jaxlora.LoRAConfig(rank=2, bias="all")
    with pytest.raises(ValueError, match="'bias' is to be trained, but is no leaf"):
        jaxlora.init(jax.random.key(0), linear, {"w": normal(0, 8, 6)}, X, config=config)


VOCABULARY = {"embedding": normal(0, 10, 6), "w": normal(1, 6, 4)}
IDS = jnp.array([[1, 7, 7], [9, 0, 2]])


def tied(params, ids):
    return params["embedding"][ids] @ params["w"] @ params["w"].T @ params["embedding"].T


def rows_of(**config) -> Any:
    config = jaxlora.LoRAConfig(
        **{"rank": 2, "targets": ("w",), "rows": {"embedding": (7, 1)}} | config
    )
    return jaxlora.init(jax.random.key(0), tied, VOCABULARY, IDS, config=config)


def test_rows_are_trained_and_others_stay(tmp_path):
    base, adapters = moved(rows_of())
    assert (adapters["embedding"].rows, adapters["embedding"].value.shape) == ((1, 7), (2, 6))
    jaxlora.save_adapters(tmp_path / "a", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "a", base=base)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    merged = jaxlora.merge(jaxlora.bind(base, loaded))
    wanted = np.array(VOCABULARY["embedding"])
    wanted[[1, 7]] += np.float32(0.1)
    assert_allclose(merged["embedding"], wanted, rtol=1e-6)

    def loss(adapters):
        return jnp.sum(jnp.tanh(jaxlora.lora(tied, strict=True)(jaxlora.bind(base, adapters), IDS)))

    def whole_loss(embedding):
        return jnp.sum(jnp.tanh(tied(merged | {"embedding": embedding}, IDS)))

    got: Any = jax.grad(loss)(adapters)["embedding"].value
    assert_allclose(got, jax.grad(whole_loss)(merged["embedding"])[jnp.array([1, 7])], rtol=1e-4)


def test_rows_that_are_not_there_are_refused():
    for config, message in [
        ({"rows": {"embedding": (10,)}}, r"'embedding' of shape \(10, 6\) has no row 10"),
        ({"rows": {"embedding": ()}}, r"rows\['embedding'\] must be indices from 0"),
        (
            {"rows": {"embeding": (1,)}},
            "'embeding' is to be trained, but is no leaf",
        ),
        ({"rows": {"w": (1,)}}, "'w' is to be trained, and 'w' is adapted"),
        ({"train": ("embedding",)}, "'embedding' is to be trained twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            rows_of(**config)
    with pytest.raises(TypeError, match=r"rows\['embedding'\] must be indices: got 1.5"):
        rows_of(rows={"embedding": (1.5,)})
    base, _ = jaxlora.split(rows_of())
    wrong = {"embedding": Replacement(jnp.ones((3, 6)), (10, 6), rows=(1, 7))}
    with pytest.raises(ValueError, match=r"the value of 'embedding' must have the shape \(2, 6\)"):
        jaxlora.bind(base, wrong)


def test_rows_are_told_with_the_shape_of_the_leaf():
    assert re.search(r"embedding +\(10, 6\) +itself +12 ", str(jaxlora.summary(rows_of())))


def test_adapters_alone_are_frozen_by_name():
    """Also a leaf whose own name is that of a factor is known by what it is."""
    params = {"w": normal(0, 8, 6), "b": normal(1, 6)}

    def model(params, x):
        return x @ params["w"] + params["b"][None]

    config = jaxlora.LoRAConfig(rank=2, bias="all")
    adapters = jaxlora.split(jaxlora.init(jax.random.key(0), model, params, X, config=config))[1]
    ones = jax.tree.map(jnp.ones_like, adapters)
    for train, wanted in {("value",): (0, -1), ("b",): (-1, 0), ("b", "value"): (-1, -1)}.items():
        tx = jaxlora.freeze(optax.sgd(1.0), train=train)
        updates: Any = tx.update(ones, tx.init(adapters), adapters)[0]
        assert not updates["w"].a.any()
        assert_array_equal(updates["w"].b, jnp.full((2, 6), wanted[0]))
        assert_array_equal(updates["b"].value, jnp.full(6, wanted[1]))
    updates = jaxlora.optim.scale_rates(b=16).update(ones, optax.EmptyState(), adapters)[0]
    assert_array_equal(updates["b"].value, ones["b"].value)


def test_leaves_of_a_module_are_frozen_by_name():
    module = nnx.Sequential(nnx.LayerNorm(8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    config = jaxlora.LoRAConfig(rank=2, train=("scale",), bias="lora_only")
    adapted = jaxlora.nnx.adapt(nnx.Rngs(2), module, X, config=config)
    before = adapted.adapters()
    tx = jaxlora.freeze(optax.sgd(1.0), train=("value",))
    optimizer = nnx.Optimizer(adapted, tx, wrt=jaxlora.nnx.Factor)
    factors = nnx.state(adapted, jaxlora.nnx.Factor)
    optimizer.update(adapted, jax.tree.map(jnp.ones_like, factors))
    for path, adapter in adapted.adapters().items():
        for name in ("a", "b", "value"):
            if hasattr(adapter, name):
                step = getattr(adapter, name) - getattr(before[path], name)
                assert_allclose(step, -1.0 if name == "value" else 0.0, atol=1e-6)


def test_function_that_changes_its_arguments_changes_those_of_the_caller():
    class Counter(nnx.Module):
        def __init__(self):
            self.count = nnx.Variable(jnp.zeros(()))

    def count(params, counter):
        counter.count.set_value(counter.count.get_value() + 1)
        return params["w"]

    counter = Counter()
    jaxlora.lora(count)({"w": jnp.ones(3)}, counter)
    assert counter.count.get_value() == 1


def test_shapes_of_leaves_to_train_are_refused():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    with pytest.raises(ValueError, match="starts from values: 'params/norm/bias' is ShapeDtype"):
        init(shapes)


def test_leaf_with_an_adapter_has_no_replacement():
    base, adapters = moved(init())
    both = adapters | {"params/up/kernel[0:4]": adapters["params/up/kernel"]}
    value = Replacement(jnp.ones((8, 12)), (8, 12))
    for pair in (both, both | {"params/up/kernel": value}):
        with pytest.raises(ValueError, match="adapters has two for the leaf 'params/up/kernel'"):
            jaxlora.bind(base, pair)


def test_adapters_load_on_a_tree_with_leaves_to_train(tmp_path):
    params = init()
    jaxlora.save_adapters(tmp_path / "a", jaxlora.split(params)[1])
    loaded = jaxlora.load_adapters(tmp_path / "a", base=params)
    assert whole(loaded) == NORM
