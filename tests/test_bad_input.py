"""Every bad input gets an error that names the path, what is needed and what was got."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from cases import Case, normal

import jaxlora

pytestmark = pytest.mark.once

X = normal(1, 5, 8)
PARAMS = {"block": {"query": normal(0, 8, 6), "unused": normal(2, 8, 6)}, "bias": normal(3, 6)}


def model(params, x):
    return x @ params["block"]["query"] + params["bias"][None]


def init(params=PARAMS, fn=model, x=X, **config):
    config = jaxlora.LoRAConfig(**{"rank": 2, "targets": ("query",), **config})
    return jaxlora.init(jax.random.key(0), fn, params, x, config=config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "rank must be at least 1: got 0"),
        ({"alpha": float("nan")}, "alpha must be finite and positive: got nan"),
        ({"alpha": float("inf")}, "alpha must be finite and positive: got inf"),
        ({"alpha": 0.0}, "alpha must be finite and positive: got 0.0"),
        ({"targets": ()}, r"targets must name something to adapt: got \(\)"),
        ({"targets": "("}, "targets is no regular expression"),
        ({"targets": ("/",)}, "targets must be runs of path parts"),
        ({"initializer": "zeros"}, "initializer must be a function or one of"),
        ({"dtype": jnp.int32}, "dtype of the factors must be floating"),
        ({"targets": ("qeury",)}, "target 'qeury' matches no leaf; nearest: 'block/query'"),
        ({"targets": "query"}, "target 'query' matches no leaf; nearest: 'block/query'"),
        ({"targets": ("query", "kernel")}, "target 'kernel' matches no leaf"),
        ({"exclude": ("norm",)}, "exclude 'norm' matches no leaf"),
        ({"exclude": ("query",)}, "nothing to adapt"),
        ({"rank": 7}, r"rank 7 is too large for 'block/query' of shape \(8, 6\): .* is 6"),
        ({"targets": "all-linear", "rank": 7}, "nothing to adapt"),
        ({"targets": ("bias",)}, "no leaf that a supported operation consumes .*'bias': reaches"),
        ({"targets": ("unused",)}, "'block/unused': the program does not use it"),
        ({"layers": ()}, r"layers must be indices from 0, at least one: got \(\)"),
        ({"layers": [-1]}, "layers must be indices from 0"),
        ({"layers": [3]}, r"the targets have no layers \[3\]: they have \[\]"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\] must be at least 1: got 0"),
        ({"rank_pattern": {"query": 7}}, "rank 7 is too large for 'block/query'"),
        (
            {"rank_pattern": {"qeury": 2}},
            "names 'qeury', which is no target; nearest: 'block/query'",
        ),
        ({"rank_pattern": {"(": 2}}, "rank_pattern is no regular expression"),
        ({"rank_pattern": {"query": 2, "block": 1}}, "rank_pattern must name 'block/query' once"),
        ({"alpha_pattern": {"query": -1.0}}, r"alpha_pattern\['query'\] must be finite and pos"),
        ({"alpha_pattern": {"bias": 1.0}}, "alpha_pattern names 'bias', which is no target"),
        (
            {"initializer": lambda key, shape, dtype: jnp.ones(3)},
            "must return .* for 'block/query'",
        ),
    ],
)
def test_bad_choice_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        init(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 2.0},
        {"rank": True},
        {"alpha": "8"},
        {"targets": (1,)},
        {"exclude": None},
        {"layers": 3},
        {"layers": [1.0]},
        {"rank_pattern": {"query": 2.0}},
        {"rank_pattern": [("query", 2)]},
        {"alpha_pattern": {1: 2.0}},
    ],
)
def test_choice_of_a_wrong_type_is_refused(config):
    with pytest.raises(TypeError, match="must be"):
        init(**config)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (jnp.int8, "its dtype is int8, not floating"),
        (jnp.complex64, "its dtype is complex64, not floating"),
    ],
)
def test_weight_that_is_not_floating_is_refused(dtype, message):
    params = {"w": jnp.ones((8, 6), dtype)}
    with pytest.raises(ValueError, match=message):
        init(params, lambda params, x: x @ params["w"].real.astype(jnp.float32), targets=("w",))


def test_weight_with_an_axis_of_size_zero_is_refused():
    with pytest.raises(ValueError, match="'w': it has an axis of size 0"):
        init({"w": jnp.ones((8, 0))}, lambda params, x: x @ params["w"], targets=("w",))


def test_empty_tree_is_refused():
    with pytest.raises(ValueError, match="params is an empty tree"):
        init({}, lambda params, x: x)
    with pytest.raises(ValueError, match="params is an empty tree"):
        jaxlora.summary({})


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": jnp.ones((8, 6)), "a": {"b": jnp.ones((8, 6))}}
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        init(params, lambda params, x: x @ params["a/b"])


def test_tree_already_adapted_is_refused():
    with pytest.raises(ValueError, match="'block/query' is adapted already"):
        init(init())
    base, adapters = jaxlora.split(init())
    with pytest.raises(ValueError, match="'block/query' is adapted already"):
        jaxlora.bind(jaxlora.bind(base, adapters), adapters)


@pytest.mark.parametrize(
    "call",
    [
        jaxlora.split,
        jaxlora.merge,
        lambda params: jaxlora.dropout(params, jax.random.key(0), 0.1),
        lambda params: jaxlora.explain(model, params, X),
        lambda params: jaxlora.freeze(optax.sgd(1.0)).init(params),
    ],
)
def test_tree_without_factors_is_refused(call):
    with pytest.raises(ValueError, match="has no"):
        call(PARAMS)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_dropout_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        jaxlora.dropout(init(), jax.random.key(0), rate)


def test_adapter_for_another_shape_is_refused():
    base, adapters = jaxlora.split(init())
    other = {"block": {"query": normal(0, 6, 8)}}
    with pytest.raises(ValueError, match=r"'block/query' is for a weight of shape \(8, 6\): got"):
        jaxlora.bind(other, adapters)
    wrong = dataclasses.replace(adapters["block/query"], b=jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"must have the shapes .* b=\(2, 6\): got"):
        jaxlora.bind(base, {"block/query": wrong})
    with pytest.raises(TypeError, match="must be an Adapter: got"):
        jaxlora.bind(base, {"block/query": adapters["block/query"].a})


ADAPTED = init()
bind: Any = jaxlora.bind  # also with what its types refuse
combine: Any = jaxlora.algebra.combine
BASE, ADAPTERS = jaxlora.split(ADAPTED)
ALONE = "params holds adapters without their base, at '.*block/query'"
NO_BASE = "base must hold weights: got the adapter of 'block/query'"
UNSPLIT = "must be an Adapter: got .*; jaxlora.split returns the base and such adapters"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxlora.merge(ADAPTERS), rf"{ALONE}.*merge\(bind\(base, adapters\)\)"),
        (lambda: jaxlora.merge(jaxlora.split(ADAPTED)), rf"{ALONE}.*bind"),
        (lambda: jaxlora.split(ADAPTERS), f"{ALONE}: they are split already"),
        (lambda: bind(ADAPTERS, BASE), rf"{NO_BASE}.* jaxlora.bind\(base, adapters\)"),
        (lambda: bind(BASE, ADAPTED), UNSPLIT),
        (lambda: bind(BASE, [ADAPTERS]), "adapters must be a dict .* got list"),
        (lambda: bind(BASE, None), "adapters must be a dict .* got None"),
        (lambda: bind(BASE, {5: ADAPTERS["block/query"]}), "must be a str: got 5 of type int"),
        (lambda: bind(ADAPTERS, ADAPTERS), NO_BASE),
        (lambda: jaxlora.unmerge(ADAPTERS, BASE), "plain must hold weights: got the adapter of"),
        (lambda: jaxlora.algebra.scale(ADAPTED, 0.5), UNSPLIT),
        (lambda: jaxlora.algebra.pad(ADAPTED, 4), UNSPLIT),
        (lambda: jaxlora.algebra.truncate(ADAPTED, 1), UNSPLIT),
        (lambda: jaxlora.algebra.add(ADAPTED, ADAPTED), UNSPLIT),
        (lambda: combine(ADAPTERS, [1.0]), "a sequence of sets .* got one set"),
        (lambda: jaxlora.algebra.extract(BASE, ADAPTED, 1), "'block/query' is adapted, merge it"),
        (lambda: jaxlora.algebra.rebase(ADAPTED, ADAPTERS, base=BASE), UNSPLIT),
    ],
)
def test_wrong_object_is_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_wrong_object_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="bind"):
        jaxlora.save_merged(tmp_path / "merged", ADAPTERS)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8, jnp.int32, jnp.bool_])
@pytest.mark.parametrize("how", [{}, {"check_base": False}])
def test_bind_over_weights_that_are_not_floating_is_refused(dtype, how):
    query = BASE["block"]["query"].astype(dtype)
    for other in (query, jax.eval_shape(lambda: query)):
        with pytest.raises(ValueError, match=f"'block/query' cannot .* {query.dtype}, not float"):
            jaxlora.bind({"block": {"query": other}}, ADAPTERS, **how)
    with pytest.raises(ValueError, match="not floating"):
        jaxlora.unmerge({"block": {"query": query}}, ADAPTERS)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0, -1.0, "16", None])
def test_alpha_that_is_no_positive_number_is_refused(alpha):
    wrong = dataclasses.replace(ADAPTERS["block/query"], alpha=alpha)
    with pytest.raises(ValueError, match=f"alpha of 'block/query' must be .*: got {alpha}"):
        jaxlora.bind(BASE, {"block/query": wrong})


def test_adapters_that_overlap_are_refused():
    def part(name):
        return jaxlora.split(init(targets=(name,), rank=1))[1]

    for one, two in [
        ("query[:, 0:4]", "query[:, 3:6]"),
        ("query[0:4]", "query[2:5, 1:3]"),
        ("query", "query[2:5, 1:3]"),
        ("query[2:5, 1:3]", "query"),
    ]:
        with pytest.raises(
            ValueError, match=r"overlap|adapters has two for the leaf 'block/query'"
        ):
            jaxlora.bind(BASE, part(one) | part(two))
    jaxlora.bind(BASE, part("query[:, 0:3]") | part("query[:, 3:6]"))


def test_replacement_of_a_part_is_refused():
    value = jaxlora.weights.Replacement(jnp.ones(6), (6,))
    with pytest.raises(ValueError, match=r"whole leaf or for rows of it: got 'bias\[0:3\]'"):
        jaxlora.bind(BASE, {"bias[0:3]": value})


def test_adapter_for_a_missing_leaf_is_refused():
    base, adapters = jaxlora.split(init())
    with pytest.raises(ValueError, match="no leaf 'block/qery'; nearest: 'block/query'"):
        jaxlora.bind(base, {"block/qery": adapters["block/query"]})
    with pytest.raises(ValueError, match="adapters is empty"):
        jaxlora.bind(base, {})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["base", "b"])
def test_merge_that_is_not_finite_is_refused(bad, where):
    node = init()["block"]["query"]
    node = dataclasses.replace(node, **{where: getattr(node, where).at[0, 0].set(bad)})
    with pytest.raises(ValueError, match=rf"'w' is not finite: {where} hold NaN or inf"):
        jaxlora.merge({"w": node})


def test_merge_that_overflows_its_dtype_is_refused():
    case = Case(
        lambda params, x: x.astype(jnp.float16) @ params["w"],
        {"w": jnp.full((8, 6), 6e4, jnp.float16)},
        (X,),
    )
    node = case.init(jax.random.key(0))["w"]
    term = dataclasses.replace(node.term, a=jnp.full((8, 2), 100.0), b=jnp.full((2, 6), 100.0))
    node = dataclasses.replace(node, terms=(term,))
    with pytest.raises(ValueError, match="it overflows float16"):
        jaxlora.merge({"w": node})


def test_unknown_site_names_the_nearest():
    sites = jaxlora.find_sites(model, PARAMS, X)
    with pytest.raises(
        KeyError, match="no site 'block/qury': no such leaf; nearest: 'block/query'"
    ):
        sites["block/qury"]
    with pytest.raises(KeyError, match="reaches"):
        sites["bias"]


def test_error_of_the_users_function_keeps_its_message():
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        jaxlora.lora(model)(init(), jnp.ones((5, 7)))
