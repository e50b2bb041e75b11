"""Plans, against the steps that a user compiles and against XLA's own counts."""

import functools
import importlib.util
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import planned_models
import pytest
from planned_models import OPTIMIZER, check_near, full_flops, shape, xla_flops

import jaxlora
from jaxlora.planning import plan

PARAMS = {"up": shape(64, 256), "down": shape(256, 64)}
X = shape(8, 64)
CONFIG = jaxlora.LoRAConfig(rank=4)
HAS_QWIX = importlib.util.find_spec("qwix") is not None
pytestmark = pytest.mark.xdist_group("plan")  # one worker compiles what its fixture needs
needs_qwix = pytest.mark.skipif(not HAS_QWIX, reason="qwix is not installed")


@pytest.fixture(autouse=True)
def as_a_user():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(params, x):
    return jnp.mean(model(params, x) ** 2)


def planned(fn=loss, params=PARAMS, *args, **kwargs):
    settings = {"config": CONFIG, "optimizer": OPTIMIZER} | kwargs
    return plan(fn, params, *(args or (X,)), **settings)


def of_model(case):
    return plan(case.loss, case.params, *case.args, config=case.config, optimizer=OPTIMIZER)


MODELS = {
    "benchmark": planned_models.benchmark,
    "minilm": planned_models.minilm,
    "scanned": planned_models.scanned,
}


class Case:
    """A model, its plan, and the bytes of the arrays that planning it made."""

    def __init__(self, name):
        self.model = MODELS[name]()
        before = {id(array) for array in jax.live_arrays()}
        self.plan = of_model(self.model)
        new = [array for array in jax.live_arrays() if id(array) not in before]
        self.made_bytes = sum(array.nbytes for array in new)
        self.is_unrolled = name != "scanned"

    @functools.cached_property
    def full(self):
        """The step of full fine-tuning, as a user compiles it."""
        made = self.model
        state = jax.eval_shape(OPTIMIZER.init, made.params)
        step = planned_models.full_step(made.loss)
        return step.lower(made.params, state, *made.args).compile()


ONCE = [pytest.param(name, marks=pytest.mark.once) for name in MODELS if name != "benchmark"]


@pytest.fixture(scope="module", params=["benchmark", *ONCE])
def case(request):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield Case(request.param)


def test_bytes_are_those_of_the_step_that_a_user_compiles(case):
    made, found = case.model, case.plan
    check_near(found, planned_models.user_memory(made, made.params))


def test_bytes_of_full_fine_tuning_are_those_of_its_step(case):
    check_near(case.plan.full, planned_models.memory(case.full))


@needs_qwix
def test_bytes_of_qlora_are_those_of_its_step(case):
    made, found = case.model, case.plan
    nf4 = jaxlora.QuantizationConfig("nf4")
    base = jaxlora.quantize(made.loss, made.params, *made.args, config=nf4)
    check_near(found.qlora, planned_models.user_memory(made, base))
    assert found.qlora.base_bytes == jaxlora.summary(base).total_bytes


def test_terms_add_up_to_the_arguments(case):
    found = case.plan
    for step in filter(None, (found.lora, found.full, found.qlora)):
        terms = step.base_bytes + step.trained_bytes + step.state_bytes + step.data_bytes
        assert terms == step.argument_bytes


def test_parameters_are_those_that_init_makes(case):
    made, found = case.model, case.plan
    sites = jaxlora.find_sites(made.loss, made.params, *made.args)
    total = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    assert found.trained == jaxlora.planning.count(sites, made.config)
    assert found.trained == sum(row.trainable for row in found.targets)
    assert found.total == total + found.trained
    assert (found.full.trained, found.full.total) == (total, total)
    assert found.lora.state_bytes == 2 * found.lora.trained_bytes + 4  # two moments and a count


def test_operations_are_nearly_those_of_xla_where_nothing_is_scanned(case):
    found, xla = full_flops(case.plan), xla_flops(case.full)
    if case.is_unrolled:
        assert 0.9 * xla < found < xla  # which counts elementwise operations too
    else:
        assert found > 10 * xla  # which counts one of 32 layers


def test_plan_makes_no_weights(case):
    assert case.made_bytes < 10_000


def test_operations_are_those_of_products_counted_by_hand():
    found = planned()
    product = 2 * 8 * 64 * 256
    assert full_flops(found) == (2 + 2 + 1) * product  # forward, both gradients but that of x
    terms = 2 * 8 * 4 * (64 + 256)
    assert (
        found.flops == 2 * product + product + (2 * terms) + (2 * terms) + terms + 2 * 8 * 4 * 256
    )


def numbers(text):
    """Return the numbers of each row of a table of terms."""
    rows = re.findall(r"^(\S.*?)  +(\d.*)$", text.partition("\n\n")[0], re.MULTILINE)
    return {
        term: [float(x.replace(",", "")) for x in re.findall(r"\d[\d,.]*", cells)]
        for term, cells in rows
    }


@pytest.mark.once
@needs_qwix
@pytest.mark.parametrize("case", ["scanned"], indirect=True)
def test_guide_shows_the_plan_of_7_billion_parameters(case):
    page = pathlib.Path(__file__).parents[2] / "docs/guides/planning.md"
    (shown,) = [
        numbers(text)
        for text in re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL)
        if "parameters in all        6,778,970,112" in text
    ]
    wanted = numbers(str(case.plan))
    assert len(shown) == len(wanted) > 10
    for term, values in wanted.items():
        assert shown[term] == pytest.approx(values, rel=0.05), term


def looped(params, x):
    return jnp.mean(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0])


def unrolled(params, x):
    for i in range(5):
        x = jnp.tanh(x @ params["w"][i])
    return jnp.mean(x)


def test_operations_of_a_scan_are_those_of_its_layers_unrolled():
    # the scan also has the gradient of the input of its first layer
    weights, product = {"w": shape(5, 64, 64)}, 2 * 8 * 64 * 64
    found, wanted = (full_flops(planned(fn, weights)) for fn in (looped, unrolled))
    assert (found, wanted) == (15 * product, 14 * product)


def test_plan_takes_arrays_for_their_shapes():
    arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), PARAMS)
    assert planned(loss, arrays, np.ones(X.shape)) == planned()


def test_function_that_is_no_loss_is_trained_on_the_mean_of_its_squares():
    def both(params, x):
        return model(params, x), {"hidden": x @ params["up"], "step": 3}

    def mean(params, x):
        y, h = model(params, x), x @ params["up"]
        return (jnp.sum(y**2) + jnp.sum(h**2)) / (y.size + h.size)

    assert planned(both).flops == planned(mean).flops
    check_near(planned(model), {"argument_bytes": planned().argument_bytes}, 0)


def test_arguments_that_are_no_arrays_are_handed_on():
    def switched(params, x, flags):
        return loss(params, x) if flags["train"] else x

    assert planned(switched, PARAMS, X, {"train": True}).flops == planned().flops


@pytest.mark.parametrize(
    "config",
    [
        jaxlora.LoRAConfig(rank=4, initializer="pissa"),
        jaxlora.LoRAConfig(rank=4, magnitude=True),
        jaxlora.LoRAConfig(rank=4, targets=("up",), train=("down",)),
        jaxlora.LoRAConfig(rank=4, targets=("up[:, 0:64]", "up[:, 64:256]")),
        jaxlora.LoRAConfig(rank=4, targets=("up",), rows={"down": (0, 3)}),
    ],
)
def test_every_kind_of_adapters_is_planned(config):
    arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), PARAMS)
    made = jaxlora.init(jax.random.key(0), loss, arrays, jnp.ones(X.shape), config=config)
    found = planned(config=config)
    assert found.trained == jaxlora.summary(made).trainable
    sites = jaxlora.find_sites(loss, PARAMS, X)
    assert found.trained == jaxlora.planning.count(sites, config)


def test_frozen_factors_cost_no_gradient():
    alone = planned(optimizer=jaxlora.freeze(optax.sgd(1.0), train=("b",)))
    assert alone.flops < planned(optimizer=optax.sgd(1.0)).flops
    assert "no factors to train" in alone.missing["full"]
    assert "no full fine-tuning: the state of the optimizer" in str(alone)


@needs_qwix
def test_weights_that_are_quantized_already_are_planned_as_they_are():
    nf4 = jaxlora.QuantizationConfig("nf4")
    base = jaxlora.quantize(loss, PARAMS, X, config=nf4)
    found, plain = planned(loss, base), planned()
    assert found.lora == plain.qlora
    assert (found.full, found.qlora) == (None, None)
    assert "'down' is quantized, and has no gradient" in found.missing["full"]
    assert "quantized already" in found.missing["qlora"]


def test_step_that_cannot_be_made_is_told_in_the_table():
    table = {"table": shape(100, 16)}
    config = jaxlora.LoRAConfig(rank=4, targets=("table",))
    tokens = shape(8, dtype=jnp.int32)
    found = planned(lambda p, t: p["table"][t], table, tokens, config=config)
    assert found.qlora is None
    words = "nothing to adapt" if HAS_QWIX else "qwix"
    assert words in found.missing["qlora"]
    assert f"no QLoRA (nf4): {found.missing['qlora']}" in str(found)


def test_weights_that_are_left_out_are_told_where_plan_is_called():
    params = PARAMS | {"table": shape(100, 64)}

    def fn(params, x):
        return loss(params, x) + jnp.sum(params["table"][jnp.arange(3)])

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        planned(fn, params)
    assert [w.category for w in told] == [jaxlora.SkippedWeightWarning]
    assert told[0].filename == __file__
