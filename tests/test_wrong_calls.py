"""Every function is called with everything wrong in the place of each argument.

Whatever is not accepted is refused by a message of ours, not by an error from the inside of JAX.
"""

import inspect
import linecache
import pathlib
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import wrong_analyses
import wrong_calls
from flax import linen as nn
from wrong_calls import (
    ADAPTED,
    ADAPTERS,
    CODES,
    CONFIG,
    KEY,
    PARAMS,
    SAVED,
    WRONG,
    X,
    freeze,
    linear,
    model,
)

import jaxlora
import jaxlora.nnx
from jaxlora.formats import peft, safetensors

pytestmark = pytest.mark.once

CALLS = wrong_calls.CALLS | wrong_analyses.CALLS
FITTING = wrong_calls.FITTING | wrong_analyses.FITTING
PACKAGE = str(pathlib.Path(jaxlora.__file__).parent)


def raised(call, *args, **kwargs):
    """Return the error that a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    return AssertionError("it is accepted")


@pytest.mark.parametrize("name", CALLS)
def test_wrong_argument_is_refused_by_a_message_of_ours(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "load_adapters":
        jaxlora.save_adapters(SAVED, ADAPTERS)
    before = {*tmp_path.iterdir()}
    call, in_order, by_name = CALLS[name]
    for argument in {*in_order, *by_name} - {"x"}:
        fitting = FITTING.get(f"{name}.{argument}", FITTING.get(argument, set()))
        for kind in WRONG.keys() - fitting:
            args = (
                in_order | {argument: WRONG[kind]} if argument in in_order else in_order
            ).values()
            kwargs = by_name | {argument: WRONG[kind]} if argument in by_name else by_name
            error = raised(call, *args, **kwargs)
            said, frame = str(error), traceback.extract_tb(error.__traceback__)[-1]
            where = f"{argument}={kind}: {type(error).__name__}: {said}"
            assert isinstance(error, TypeError | ValueError), where
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            assert frame.filename.startswith(PACKAGE), where
            assert line.startswith("raise"), where
            assert not said.endswith("."), where
            assert ": " in said, where
    assert {*tmp_path.iterdir()} == before


def test_every_function_has_a_row():
    inner = (jaxlora.algebra, jaxlora.initializers, jaxlora.optim)
    modules = dict.fromkeys((jaxlora, *inner), "")
    modules |= {jaxlora.calibration: "calibration.", jaxlora.nnx: "nnx.", peft: "peft."}
    modules |= {safetensors: "safetensors.", jaxlora.analysis: "", jaxlora.analysis.plot: "plot."}
    modules |= {jaxlora.planning: "planning."}
    found = set()
    for module, prefix in modules.items():
        public = {name for name in module.__all__ if inspect.isfunction(getattr(module, name))}
        found |= {prefix + name for name in public}
    assert found - {*CALLS} == {"mask", "labels"}


def test_mask_and_labels_take_any_tree():
    for value in WRONG.values():
        names = {True: "trained", False: "frozen"}
        marks = jax.tree.leaves(jaxlora.mask(value))
        assert jax.tree.leaves(jaxlora.labels(value)) == [names[marked] for marked in marks]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: jaxlora.init(model, PARAMS, X, config=CONFIG),  # pyright: ignore
            "key must be one random key: got the function 'model'; make one with jax.random.key",
        ),
        (
            lambda: jaxlora.init(jax.random.split(KEY), model, PARAMS, X, config=CONFIG),
            r"key must be one random key: got an array of shape \(2,\)",
        ),
        (
            lambda: jaxlora.init(KEY, PARAMS, model, X, config=CONFIG),  # pyright: ignore
            "fn must be a function of the parameters: got dict; the order is init",
        ),
        (
            lambda: jaxlora.init(KEY, nn.Dense(3), PARAMS, X, config=CONFIG),
            "got the Linen module 'Dense'; pass its apply, as model.apply",
        ),
        (
            lambda: jaxlora.init(KEY, linear(), PARAMS, X, config=CONFIG),
            "got the NNX module 'Linear'; use jaxlora.nnx.adapt, or pass a function",
        ),
        (
            lambda: jaxlora.init(KEY, model, PARAMS, X, config=CODES),  # pyright: ignore
            "config must be a jaxlora.LoRAConfig: got QuantizationConfig",
        ),
        (
            lambda: jaxlora.quantize(model, PARAMS, X, config=CONFIG),  # pyright: ignore
            "config must be a jaxlora.QuantizationConfig: got LoRAConfig",
        ),
        (
            lambda: jaxlora.init(KEY, model, ADAPTERS, X, config=CONFIG),
            "params must hold weights: got the adapter of '.*'; put adapters over their base",
        ),
        (
            lambda: jaxlora.dropout(ADAPTED, 0.1, KEY),  # pyright: ignore
            r"got 0.1; .* the order is dropout\(params, key, rate\)",
        ),
        (
            lambda: jaxlora.calibration.moments(model, PARAMS, (X,), config=CONFIG),  # pyright: ignore
            "batches must be tuples, .* got an array of shape .* for one; put it in a tuple",
        ),
        (
            lambda: jaxlora.calibration.gradients(model, PARAMS, [(X,)], config=CONFIG),
            r"loss must return one floating number: got float32 of shape \(5, 8\)",
        ),
        (
            lambda: jaxlora.calibration.moments(
                model, jax.eval_shape(lambda: PARAMS), [(X,)], config=CONFIG
            ),
            "is the shape of an array: moments needs its values",
        ),
        (
            lambda: jaxlora.init(
                KEY,
                model,
                PARAMS,
                X,
                config=jaxlora.LoRAConfig(rank=2, initializer=jax.nn.initializers.lecun_normal),
            ),
            r"the initializer cannot be called as initializer\(.*, dtype\), as 'down' needs",
        ),
        (
            lambda: jaxlora.init(
                KEY, model, PARAMS, X, config=jaxlora.LoRAConfig(rank=2, initializer=model)
            ),
            r"the initializer cannot be called as initializer\(key, \(6, 2\), dtype\)",
        ),
        (lambda: jaxlora.LoRAConfig(dtype="flaot32"), "got 'flaot32', which is the name of none"),
        (
            lambda: freeze(optax.adam, "a"),
            "tx must be an optax transform, .* got the function 'adam'",
        ),
        (
            lambda: jaxlora.merge(ADAPTED, donate=1),  # pyright: ignore
            "donate must be True or False: got 1",
        ),
        (
            lambda: jaxlora.algebra.combine([ADAPTERS], 0.5),  # pyright: ignore
            "weights must be numbers in order: got 0.5",
        ),
        (
            lambda: jax.jit(lambda w: jaxlora.algebra.combine([ADAPTERS], [w]))(0.5),
            r"weights\[0\] must be a number: got a traced array of shape \(\), float32",
        ),
        (
            lambda: jax.jit(lambda w: jaxlora.algebra.extract(w, w, 1))(PARAMS),
            "extract is called inside of jax.jit or another transformation",
        ),
        (
            lambda: jaxlora.algebra.extract({"n": 3} | PARAMS, {"n": 3} | PARAMS, 1),
            "the leaf 'n' must be an array: got 3",
        ),
        (
            lambda: jaxlora.initializers.eva(PARAMS),
            r"moments must be arrays \(stack, .* got an array of shape \(8, 6\), float32 for 'up'",
        ),
        (
            lambda: jaxlora.algebra.rebase(ADAPTERS, ADAPTERS, base=ADAPTED),
            "'down' is adapted already: rebase needs a plain tree",
        ),
    ],
)
def test_common_mistake_is_told_what_to_do(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("mlp", r'a regular expression for whole paths: for a name write \("mlp",\)'),
        ("block_*", 'in which any text is .*: write ".*block_.*"'),
        (("block_*",), 'for one regular expression write ".*block_.*"'),
        (("(up|down)_proj",), r'for one regular expression write "\(up\|down\)_proj"'),
        (("layer.up",), r"joined by '/': write \('layer/up',\)"),
        (("uq",), "nearest: 'up'$"),
    ],
)
def test_target_of_another_form_is_told_how_to_write_it(targets, words):
    for field in ("targets", "exclude", "train"):
        config = jaxlora.LoRAConfig(**{"rank": 2, field: targets})
        with pytest.raises(ValueError, match=words):
            jaxlora.init(KEY, model, PARAMS, X, config=config)


def test_layers_without_numbers_are_told_what_a_layer_is():
    config = jaxlora.LoRAConfig(rank=2, layers=[0])
    with pytest.raises(ValueError, match=r"a layer is a number .* and 'down', 'up' has neither"):
        jaxlora.init(KEY, model, PARAMS, X, config=config)


def test_numbers_of_every_kind_are_accepted():
    wanted = np.asarray(ADAPTERS["up"].b) * 0.5
    half: list[Any] = [0.5, np.float32(0.5), np.asarray(0.5), jnp.asarray(0.5)]
    for factor in half:
        scaled = jaxlora.algebra.scale(ADAPTERS, factor)
        np.testing.assert_array_equal(scaled["up"].b, wanted)
    scaled = jax.jit(jaxlora.algebra.scale)(ADAPTERS, 0.5)
    np.testing.assert_array_equal(scaled["up"].b, wanted)
    weights: list[Any] = [[0.5], (0.5,), np.array([0.5]), jnp.array([0.5]), [jnp.asarray(0.5)]]
    (first, *others) = [jaxlora.algebra.combine([ADAPTERS], each)["up"].a for each in weights]
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert jaxlora.LoRAConfig(rank=np.int64(2)).rank == 2  # pyright: ignore


def test_keys_of_both_kinds_are_accepted():
    keys: list[Any] = [KEY, jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0))]
    for key in keys:
        params = jaxlora.init(key, model, PARAMS, X, config=CONFIG)
        assert jaxlora.dropout(params, key, 0.5)["up"].dropout_rate == 0.5
