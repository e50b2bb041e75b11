"""What targets match, and that the choice of sites follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from cases.layers_linen import linen_layers, linen_tied_embedding

import jaxlora
from jaxlora.config import matches, select

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
    tied = linen_tied_embedding()
    assert adapted(tied, rank=2) == ["params/dense/kernel", "params/embed/embedding"]

    def model(params, x, i):
        return x @ params["big"] @ params["narrow"] + params["table"][i]

    params = {"big": normal(0, 8, 6), "narrow": normal(0, 6, 2), "table": normal(0, 9, 2)}
    sites = jaxlora.find_sites(model, params, jnp.ones((5, 8)), jnp.arange(5))
    assert sites["table"].is_lookup
    config = jaxlora.LoRAConfig(rank=3)
    assert select(config, sites) == [("big", None)]


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
