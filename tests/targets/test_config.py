"""What targets match, and that the choice of sites follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from cases.layers_linen import linen_layers, linen_tied_embedding

import jaxlora
from jaxlora.targets.selection import matches, select
from jaxlora.weights import blocks

pytestmark = pytest.mark.once

PATHS = [
    "params/block_0/query/kernel",
    "params/block_0/query/bias",
    "params/block_10/query/kernel",
    "params/block_1/mlp/up/kernel",
    "params/query_norm/scale",
]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("query", PATHS[:3]),
        ("mlp/up", PATHS[3:4]),
        ("block_1", PATHS[3:4]),
        ("up/mlp", []),
        ("quer", []),
        ("params/block_0/query/kernel", PATHS[:1]),
    ],
)
def test_name_is_a_run_of_whole_parts(name, wanted):
    assert matches((name,), PATHS) == {name: wanted}


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [(".*query/kernel", [PATHS[0], PATHS[2]]), ("query", []), (r".*block_\d/.*kernel", PATHS[::3])],
)
def test_expression_matches_whole_paths(expression, wanted):
    assert matches(expression, PATHS)[expression] == wanted


def adapted(case, **config):
    config = jaxlora.LoRAConfig(**config)
    params = jaxlora.init(jax.random.key(0), case.fn, case.params, *case.args, config=config)
    return list(jaxlora.split(params)[1])


def test_all_linear_takes_every_product_and_no_lookup_or_smaller_side():
    case = linen_layers()
    every = [f"params/block_{i}/{name}/kernel" for i in range(3) for name in ("down", "up")]
    assert adapted(case, rank=8) == every
    tied = linen_tied_embedding()  # looked up and multiplied with
    with pytest.warns(jaxlora.SkippedWeightWarning, match="embedding .*: it is looked up"):
        assert adapted(tied, rank=2) == ["params/dense/kernel"]
    assert adapted(tied, rank=2, targets=("embed",)) == ["params/embed/embedding"]

    def model(params, x, i):
        return x @ params["big"] @ params["narrow"] + params["table"][i]

    params = {"big": normal(0, 8, 6), "narrow": normal(0, 6, 2), "table": normal(0, 9, 2)}
    sites = jaxlora.find_sites(model, params, jnp.ones((5, 8)), jnp.arange(5))
    assert sites["table"].is_looked_up
    config = jaxlora.LoRAConfig(rank=3)
    assert [target.path for target in select(config, sites)] == ["big"]


def test_exclude_wins():
    case = linen_layers()
    chosen = adapted(case, rank=2, exclude=("block_1", "down"))
    assert chosen == ["params/block_0/up/kernel", "params/block_2/up/kernel"]
    assert adapted(case, rank=2, targets=("up",), exclude=".*block_[01].*") == chosen[1:]


@pytest.mark.parametrize(
    ("name", "deviation", "bound"),
    [
        ("uniform", 1 / np.sqrt(3 * 4096), 1 / 64),  # as PEFT: standard deviation .00902
        ("normal", 1 / 16, np.inf),
        ("kaiming", np.sqrt(2 / 4096), np.sqrt(6 / 4096)),  # as PEFT would not: .02210
        (lambda key, shape, dtype: jnp.full(shape, 0.5, dtype), 0.0, 0.5),
        (jax.nn.initializers.lecun_normal(), 1 / 64, np.inf),
    ],
)
def test_initializer_draws_from_its_distribution(name, deviation, bound, key):
    config = jaxlora.LoRAConfig(rank=16, initializer=name)
    params = {"w": jnp.zeros((4096, 32))}
    params = jaxlora.init(key, lambda p, x: x @ p["w"], params, jnp.ones((1, 4096)), config=config)
    a = np.asarray(params["w"].a)
    assert a.std() == pytest.approx(deviation, rel=0.02)
    assert np.abs(a).max() <= bound


def test_stack_entries_differ(key):
    params = {"w": normal(0, 3, 8, 6)}
    x = normal(1, 3, 5, 8)
    config = jaxlora.LoRAConfig(rank=2)
    node = jaxlora.init(
        key, lambda p, x: jnp.einsum("etd,edo->eto", x, p["w"]), params, x, config=config
    )["w"]
    assert node.roles == jaxlora.Roles((0,), (1,), (2,))
    assert len(np.unique(np.asarray(node.a))) == node.a.size


def test_factors_have_the_dtype_asked_for(key):
    config = jaxlora.LoRAConfig(rank=2, dtype=jnp.bfloat16)
    params = jaxlora.init(
        key, lambda p, x: x @ p["w"], {"w": normal(0, 8, 6)}, normal(1, 5, 8), config=config
    )
    assert params["w"].a.dtype == params["w"].b.dtype == jnp.bfloat16
    assert params["w"].base.dtype == jnp.float32


def test_rank_stabilized_scales_by_the_root_of_the_rank(key):
    config = jaxlora.LoRAConfig(rank=4, alpha=6, rank_stabilized=True)
    assert config.scaling == 3.0  # 6 / √4
    params = {"w": normal(0, 8, 6)}
    params = jaxlora.init(key, lambda p, x: x @ p["w"], params, normal(1, 5, 8), config=config)
    assert params["w"].scaling == 3.0


def stacked(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


STACKED = {
    "layers": {"up": normal(0, 6, 8, 12), "down": normal(1, 6, 12, 8)},
    "head": normal(2, 8, 4),
}


def chosen(fn, params, *args, **config):
    sites = jaxlora.find_sites(fn, params, *args)
    return {
        blocks.name(*target[:2]): target[2:]
        for target in select(jaxlora.LoRAConfig(**{"rank": 2, "alpha": 8.0, **config}), sites)
    }


def test_patterns_give_other_ranks_and_alphas():
    case = linen_layers()
    found = chosen(
        case.fn,
        case.params,
        *case.args,
        rank_pattern={"up": 4, "params/block_0/down/kernel": 3},
        alpha_pattern={r".*block_[01]/.*": 16.0},
    )
    assert found["params/block_0/up/kernel"] == (4, 16.0)
    assert found["params/block_2/up/kernel"] == (4, 8.0)
    assert found["params/block_0/down/kernel"] == (3, 16.0)
    assert found["params/block_2/down/kernel"] == (2, 8.0)


def test_patterns_of_a_stabilized_rank_scale_by_its_root():
    pattern = {"rank_pattern": {"head": 4}}
    found = chosen(stacked, STACKED, normal(3, 5, 8), rank_stabilized=True, **pattern)
    assert found["head"] == (4, 16.0)  # 8 / √4 is 16 / 4


def test_rank_pattern_decides_what_all_linear_can_hold():
    found = chosen(stacked, STACKED, normal(3, 5, 8), rank=6, rank_pattern={"head": 4})
    assert list(found) == ["head", "layers/down", "layers/up"]
    assert "head" not in chosen(stacked, STACKED, normal(3, 5, 8), rank=6)


def test_layers_are_numbers_in_paths():
    case = linen_layers()
    found = chosen(case.fn, case.params, *case.args, layers=[0, 2], targets=("up",))
    assert list(found) == ["params/block_0/up/kernel", "params/block_2/up/kernel"]


def test_layers_are_entries_of_a_stack():
    found = chosen(stacked, STACKED, normal(3, 5, 8), layers=[5, 1, 2], targets=("up",))
    assert list(found) == ["layers/up[1:3, :, :]", "layers/up[5:6, :, :]"]
    every = chosen(stacked, STACKED, normal(3, 5, 8), layers=range(6))
    assert list(every) == ["layers/down", "layers/up"]  # the head is in no layer
    cut = chosen(stacked, STACKED, normal(3, 5, 8), layers=[3], targets=("up[3:, 0:5]",))
    assert list(cut) == ["layers/up[3:4, 0:5, :]"]


def test_layers_left_alone_do_not_change(key):
    x = normal(3, 5, 8)
    config = jaxlora.LoRAConfig(rank=2, layers=range(2, 6))
    params = jaxlora.init(key, stacked, STACKED, x, config=config)
    base, adapters = jaxlora.split(params)
    adapters = jax.tree.map(jnp.ones_like, adapters)
    merged = jaxlora.merge(params := jaxlora.bind(base, adapters))
    for name in ("up", "down"):
        changed = np.abs(merged["layers"][name] - STACKED["layers"][name]).max((1, 2)) > 0
        assert changed.tolist() == [False] * 2 + [True] * 4
    y, plain = jaxlora.lora(stacked, strict=True)(params, x), stacked(merged, x)
    np.testing.assert_allclose(y, plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())


def test_patterns_name_parts_as_targets_do():
    params, x = {"w": normal(0, 8, 6)}, normal(1, 5, 8)
    found = chosen(
        lambda p, x: x @ p["w"],
        params,
        x,
        targets=("w[:, :2]", "w[:, 2:]"),
        rank_pattern={"w[:, :2]": 1, "w[:, -4:]": 3},
    )
    assert {name: rank for name, (rank, _) in found.items()} == {"w[:, 0:2]": 1, "w[:, 2:6]": 3}
