"""Every function is called with everything wrong in the place of each argument.

Whatever is not accepted is refused by a message of ours, not by an error from the inside of JAX.
"""

import linecache
import pathlib
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import linen as nn
from flax import nnx

import jaxlora

pytestmark = pytest.mark.once

PACKAGE = str(pathlib.Path(jaxlora.__file__).parent)
X, KEY = normal(0, 5, 8), jax.random.key(0)
PARAMS = {"up": normal(1, 8, 6), "down": normal(2, 6, 8)}
CONFIG = jaxlora.LoRAConfig(rank=2)
CODES = jaxlora.Quantization("int8", 2, double=False)


def model(params, x):
    return x @ params["up"] @ params["down"]


def loss(params, x):
    return jnp.sum(model(params, x))


def freeze(tx, train):
    return jaxlora.freeze(tx, train=train)


def linear():
    return nnx.Linear(8, 6, rngs=nnx.Rngs(0))


ADAPTED = jaxlora.init(KEY, model, PARAMS, X, config=CONFIG)
ADAPTERS = jaxlora.split(ADAPTED)[1]
WRONG = {
    "None": None,
    "a bool": True,
    "an int": 3,
    "a float": 1.5,
    "NaN": float("nan"),
    "a string": "up",
    "bytes": b"x",
    "an empty dict": {},
    "an empty list": [],
    "a tuple of arrays": (X,),
    "a set": {1},
    "an array": X,
    "an array of strings": np.array(["a"]),
    "a shape": jax.ShapeDtypeStruct((8, 6), jnp.float32),
    "a key": KEY,
    "keys": jax.random.split(KEY),
    "a class": dict,
    "a function": model,
    "a jitted function": jax.jit(model),
    "a Linen module": nn.Dense(3),
    "an NNX module": linear(),
    "params": PARAMS,
    "adapted params": ADAPTED,
    "adapters": ADAPTERS,
    "an adapted weight": ADAPTED["up"],
    "an adapter": ADAPTERS["up"],
    "a tree of ints": {"up": 1},
    "a config": CONFIG,
    "a quantization": CODES,
    "a transform without its call": optax.adam,
}
FUNCTIONS = {"a function", "a jitted function", "a transform without its call"}
# of these the error is that of the user's function, which is to be kept
TREES = {"a tuple of arrays", "an array", "a shape", "an NNX module", "params", "adapted params"}
TREES |= {"an adapted weight"}
NUMBERS = {"an int", "a float"}
NAMES = {"a string", "an array of strings"}
MAYBE_NAMES = NAMES | {"an empty list"}
PATTERNS = {"an empty dict", "a tree of ints"}
ADAPTED_TREES = {"adapted params", "adapters", "an adapted weight", "an adapter"}
CALLS = {
    "init": (jaxlora.init, {"key": KEY, "fn": model, "params": PARAMS, "x": X}, {"config": CONFIG}),
    "find_sites": (jaxlora.find_sites, {"fn": model, "params": PARAMS, "x": X}, {}),
    "explain": (jaxlora.explain, {"fn": model, "params": ADAPTED, "x": X}, {}),
    "lora": (jaxlora.lora, {"fn": model}, {"strict": False, "form": "auto"}),
    "quantize": (jaxlora.quantize, {"fn": model, "params": PARAMS, "x": X}, {"config": CODES}),
    "dequantize": (jaxlora.dequantize, {"params": PARAMS}, {}),
    "moments": (
        jaxlora.moments,
        {"fn": model, "params": PARAMS, "batches": [(X,)]},
        {"config": CONFIG},
    ),
    "gradients": (
        jaxlora.gradients,
        {"fn": loss, "params": PARAMS, "batches": [(X,)]},
        {"config": CONFIG},
    ),
    "dropout": (jaxlora.dropout, {"params": ADAPTED, "key": KEY, "rate": 0.1}, {}),
    "freeze": (freeze, {"tx": optax.sgd(1.0), "train": ("a", "b")}, {}),
    "scale_rates": (jaxlora.optim.scale_rates, {}, {"a": 1.0, "b": 1.0, "magnitude": 1.0}),
    "decay_factors": (jaxlora.optim.decay_factors, {}, {"a": 1.0, "b": 1.0, "magnitude": 1.0}),
    "precondition": (jaxlora.optim.precondition, {"damping": 1e-6}, {}),
    "freeze.init": (freeze(optax.sgd(1.0), "a").init, {"factors": ADAPTERS}, {}),
    "scale_rates.init": (jaxlora.optim.scale_rates().init, {"factors": ADAPTERS}, {}),
    "precondition.init": (jaxlora.optim.precondition().init, {"factors": ADAPTERS}, {}),
    "LoRAConfig": (jaxlora.LoRAConfig, {}, vars(CONFIG)),
    "Quantization": (jaxlora.Quantization, {}, vars(CODES)),
}
FITTING = {
    "key": {"a key"},
    "fn": FUNCTIONS,
    "params": TREES,
    "config": {"a config", "a quantization"},  # the other kind has a test of its own
    "strict": {"a bool"},
    "batches": {"a tuple of batches"},
    "rate": set(),
    "train": MAYBE_NAMES,
    "factors": ADAPTED_TREES,
    **dict.fromkeys(("a", "b", "magnitude", "damping"), NUMBERS | {"a bool"}),
    "rank": {"an int"},
    "alpha": NUMBERS,
    **dict.fromkeys(("targets", "exclude"), MAYBE_NAMES),
    "layers": {"None", "a set"},
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "rows"), PATTERNS),
    "rank_stabilized": {"a bool"},
    "initializer": FUNCTIONS,
    "block_size": {"an int"},
    "double": {"a bool"},
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_argument_is_refused_by_a_message_of_ours(name):
    call, in_order, by_name = CALLS[name]
    for argument in {*in_order, *by_name} - {"x"}:
        for kind in WRONG.keys() - FITTING.get(argument, set()):
            args = (
                in_order | {argument: WRONG[kind]} if argument in in_order else in_order
            ).values()
            kwargs = by_name | {argument: WRONG[kind]} if argument in by_name else by_name
            with pytest.raises((TypeError, ValueError)) as caught:
                call(*args, **kwargs)
            said, frame = str(caught.value), traceback.extract_tb(caught.value.__traceback__)[-1]
            where = f"{argument}={kind}: {type(caught.value).__name__}: {said}"
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            assert frame.filename.startswith(PACKAGE), where
            assert line.startswith("raise"), where
            assert not said.endswith("."), where
            assert ": " in said, where


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
            "config must be a jaxlora.LoRAConfig: got Quantization",
        ),
        (
            lambda: jaxlora.quantize(model, PARAMS, X, config=CONFIG),  # pyright: ignore
            "config must be a jaxlora.Quantization: got LoRAConfig",
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
            lambda: jaxlora.moments(model, PARAMS, (X,), config=CONFIG),  # pyright: ignore
            "batches must be tuples, .* got an array of shape .* for one; put it in a tuple",
        ),
        (
            lambda: jaxlora.gradients(model, PARAMS, [(X,)], config=CONFIG),
            r"loss must return one floating number: got float32 of shape \(5, 8\)",
        ),
        (
            lambda: jaxlora.moments(model, jax.eval_shape(lambda: PARAMS), [(X,)], config=CONFIG),
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


def test_keys_of_both_kinds_are_accepted():
    keys: list[Any] = [KEY, jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0))]
    for key in keys:
        params = jaxlora.init(key, model, PARAMS, X, config=CONFIG)
        assert jaxlora.dropout(params, key, 0.5)["up"].dropout_rate == 0.5
