"""Everything wrong, calls in which it may stand, and where it is not wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import wrong_calls_of_planning
from cases import normal
from flax import linen as nn
from flax import nnx

import jaxlora
import jaxlora.nnx
from jaxlora import algebra, initializers
from jaxlora.formats import Names, diffusion, names, peft, safetensors

X, KEY = normal(0, 5, 8), jax.random.key(0)
PARAMS = {"up": normal(1, 8, 6), "down": normal(2, 6, 8)}
CONFIG = jaxlora.LoRAConfig(rank=2)
CODES = jaxlora.QuantizationConfig("int8", 2, double=False)


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
ANY_TREES = TREES | {"adapters", "an adapter"}
SAVED = "saved"  # where the adapters are saved, in the working directory
NUMBERS = {"an int", "a float"}
NAMES = {"a string", "an array of strings"}
MAYBE_NAMES = NAMES | {"an empty list"}
PATTERNS = {"an empty dict", "a tree of ints"}
ADAPTED_TREES = {"adapted params", "adapters", "an adapted weight", "an adapter"}
BASE = jaxlora.split(ADAPTED)[0]
PISSA = jaxlora.LoRAConfig(rank=2, initializer="pissa")
INITIAL = jaxlora.split(jaxlora.init(KEY, model, PARAMS, X, config=PISSA))[1]
MODULE = linear()
MADE = jaxlora.nnx.adapt(KEY, MODULE, X, config=CONFIG)
FILE = (
    {"folder": "folder"},
    {"sites": jaxlora.find_sites(model, PARAMS, X), "names": Names(("{p}", "{p}"))},
)
MATRICES = {"up": jnp.eye(8)[None]}
DRAWN = ({"key": KEY, "shape": (8, 2), "dtype": jnp.float32}, {})
CALLS = {
    "init": (jaxlora.init, {"key": KEY, "fn": model, "params": PARAMS, "x": X}, {"config": CONFIG}),
    "find_sites": (jaxlora.find_sites, {"fn": model, "params": PARAMS, "x": X}, {}),
    "explain": (
        jaxlora.explain,
        {"fn": model, "params": ADAPTED, "x": X},
        {"platform": "cpu"},
    ),
    "lora": (jaxlora.lora, {"fn": model}, {"strict": False, "form": "auto"}),
    "quantize": (jaxlora.quantize, {"fn": model, "params": PARAMS, "x": X}, {"config": CODES}),
    "dequantize": (jaxlora.dequantize, {"params": PARAMS}, {}),
    "calibration.moments": (
        jaxlora.calibration.moments,
        {"fn": model, "params": PARAMS, "batches": [(X,)]},
        {"config": CONFIG},
    ),
    "calibration.gradients": (
        jaxlora.calibration.gradients,
        {"fn": loss, "params": PARAMS, "batches": [(X,)]},
        {"config": CONFIG},
    ),
    **wrong_calls_of_planning.CALLS,
    "dropout": (jaxlora.dropout, {"params": ADAPTED, "key": KEY, "rate": 0.1}, {}),
    "freeze": (freeze, {"tx": optax.sgd(1.0), "train": ("a", "b")}, {}),
    "scale_rates": (jaxlora.optim.scale_rates, {}, {"a": 1.0, "b": 1.0, "magnitude": 1.0}),
    "decay_factors": (jaxlora.optim.decay_factors, {}, {"a": 1.0, "b": 1.0, "magnitude": 1.0}),
    "precondition": (jaxlora.optim.precondition, {"damping": 1e-6}, {}),
    "freeze.init": (freeze(optax.sgd(1.0), "a").init, {"factors": ADAPTERS}, {}),
    "scale_rates.init": (jaxlora.optim.scale_rates().init, {"factors": ADAPTERS}, {}),
    "precondition.init": (jaxlora.optim.precondition().init, {"factors": ADAPTERS}, {}),
    "LoRAConfig": (jaxlora.LoRAConfig, {}, vars(CONFIG)),
    "QuantizationConfig": (jaxlora.QuantizationConfig, {}, vars(CODES)),
    "split": (jaxlora.split, {"adapted": ADAPTED}, {}),
    "bind": (jaxlora.bind, {"base": BASE, "adapters": ADAPTERS}, {"check_base": True}),
    "merge": (
        jaxlora.merge,
        {"adapted": ADAPTED},
        {"donate": False, "requantize": False},
    ),
    "merge_error": (jaxlora.merge_error, {"adapted": ADAPTED}, {"requantize": False}),
    "unmerge": (
        jaxlora.unmerge,
        {"plain": jaxlora.merge(ADAPTED), "adapters": ADAPTERS},
        {"check_base": True},
    ),
    "summary": (jaxlora.summary, {"any tree": ADAPTED}, {}),
    "save_adapters": (
        jaxlora.save_adapters,
        {"path": "adapters", "adapters": ADAPTERS},
        {"base": None},
    ),
    "load_adapters": (jaxlora.load_adapters, {"path": SAVED}, {"base": BASE}),
    "save_merged": (jaxlora.save_merged, {"path": "merged", "adapted": ADAPTED}, {}),
    "rebase": (
        jaxlora.algebra.rebase,
        {"adapters": INITIAL, "initial": INITIAL},
        {"base": PARAMS},
    ),
    "add": (algebra.add, {"a set of adapters": ADAPTERS}, {}),
    "scale": (algebra.scale, {"a set of adapters": ADAPTERS, "number": 2.0}, {}),
    "pad": (algebra.pad, {"a set of adapters": ADAPTERS, "rank": 4}, {}),
    "truncate": (algebra.truncate, {"a set of adapters": ADAPTERS, "rank": 1}, {}),
    "delta": (algebra.delta, {"adapted": ADAPTED, "name": "up"}, {}),
    "combine": (
        algebra.combine,
        {"sets": [ADAPTERS], "weights": [1.0], "combining": algebra.Concatenation()},
        {},
    ),
    "MagnitudePruning": (algebra.MagnitudePruning, {"density": 0.5}, {}),
    "Ties": (algebra.Ties, {"density": 0.5}, {"majority": "total"}),
    "DareLinear": (algebra.DareLinear, {"density": 0.5, "key": KEY}, {}),
    "DareTies": (algebra.DareTies, {"density": 0.5, "key": KEY}, {"majority": "total"}),
    "Svd": (algebra.Svd, {}, {"rule": algebra.Linear(), "rank": 1}),
    "peft.combine": (
        peft.combine,
        {"sets": [ADAPTERS], "weights": [1.0], "combination_type": "dare_ties_svd"},
        {"svd_rank": 1, "density": 0.5, "majority_sign_method": "total", "key": KEY},
    ),
    "peft.load": (peft.load, *FILE),
    "peft.save": (
        peft.save,
        FILE[0] | {"adapters": ADAPTERS},
        FILE[1] | {"base_model_name_or_path": None},
    ),
    "diffusion.load": (diffusion.load, FILE[0], FILE[1] | {"ignore": ("up",)}),
    "diffusion.save": (
        diffusion.save,
        FILE[0] | {"adapters": ADAPTERS},
        FILE[1] | {"style": "kohya", "metadata": {"a": "b"}},
    ),
    "names.find": (
        names.find,
        {"torch_names": {"a.weight": (6, 8), "b.weight": (8, 6)}, "sites": FILE[1]["sites"]},
        {"known": ()},
    ),
    "safetensors.load": (
        safetensors.load,
        {"folder": "folder", "names": FILE[1]["names"], "like": PARAMS},
        {"sites": FILE[1]["sites"], "ignore": ("up",)},
    ),
    "safetensors.save": (
        safetensors.save,
        {"folder": "folder", "params": PARAMS, "names": FILE[1]["names"]},
        {"sites": FILE[1]["sites"], "max_shard_bytes": 1000},
    ),
    "extract": (
        algebra.extract,
        {"base": BASE, "finetuned": jax.tree.map(lambda w: w + 1, BASE), "rank": 1},
        {"sites": None},
    ),
    "uniform": (initializers.uniform, *DRAWN),
    "normal": (initializers.normal, *DRAWN),
    "kaiming": (initializers.kaiming, *DRAWN),
    "orthogonal": (initializers.orthogonal, *DRAWN),
    "FromWeight": (initializers.FromWeight, {}, vars(initializers.eva(MATRICES))),
    "pissa": (initializers.pissa, {"iterations": 3}, {}),
    "eva": (initializers.eva, {"moments": MATRICES}, {}),
    "eva_ranks": (initializers.eva_ranks, {"moments": MATRICES, "rank": 2}, {"rho": 2.0}),
    "corda": (initializers.corda, {"moments": MATRICES}, {"keep": True}),
    "lora_ga": (initializers.lora_ga, {"gradients": MATRICES}, {"gamma": 2.0}),
    "loftq": (initializers.loftq, {"params": PARAMS}, {"iterations": 1}),
    "nnx.adapt": (
        jaxlora.nnx.adapt,
        {"rngs": nnx.Rngs(0), "module": MODULE, "x": X},
        {"config": CONFIG, "dropout_rate": 0.0, "method": "__call__"},
    ),
    "nnx.merge": (jaxlora.nnx.merge, {"an adapted module": MADE}, {}),
    "nnx.Adapted": (
        jaxlora.nnx.Adapted,
        {"module": MODULE, "adapters": MADE.adapters()},
        {"dropout_rate": 0.0, "rngs": None},
    ),
}
FITTING = {
    "key": {"a key"},
    **wrong_calls_of_planning.FITTING,
    "fn": FUNCTIONS,
    "params": TREES,
    "config": {"a config", "a quantization"},  # the other kind has a test of its own
    "strict": {"a bool"},
    "batches": {"a tuple of batches"},
    "rate": set(),
    "train": MAYBE_NAMES,
    **dict.fromkeys(("a", "b", "magnitude", "damping"), NUMBERS | {"a bool"}),
    "rank": {"an int"},
    "alpha": NUMBERS,
    **dict.fromkeys(("targets", "exclude"), MAYBE_NAMES),
    "layers": {"None", "a set"},
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), PATTERNS),
    **{name: {"an empty dict"} for name in ("rows", "stack")},
    "rank_stabilized": {"a bool"},
    "initializer": FUNCTIONS,
    "block_size": {"an int"},
    "double": {"a bool"},
    "adapted": {"adapted params", "an adapted weight"},
    "any tree": ANY_TREES,
    **{name: {"params"} for name in ("base", "plain", "finetuned")},
    "save_adapters.base": {"None", "params"},
    "load_adapters.base": {"params", "adapted params"},
    **{name: {"adapters"} for name in ("adapters", "initial")},
    "a set of adapters": {"adapters", "an empty dict"},
    **{name: {"a bool"} for name in ("check_base", "donate", "requantize", "keep")},
    **{name: {"a string"} for name in ("path", "name", "FromWeight.name")},
    "delta.adapted": {"adapted params"},
    "number": NUMBERS,
    **{name: {"None", "an int"} for name in ("Svd.rank", "svd_rank")},
    "rule": {"None"},
    "sites": {"None"},
    **{
        f"{call}.sites": set()
        for call in (
            *("diffusion.load", "names.find", "peft.load"),
            *("safetensors.load", "safetensors.save"),
        )
    },
    "style": set(),
    "torch_names": set(),
    "known": {"an empty dict", "an empty list", "a set"},
    "metadata": {"None", "an empty dict"},
    "like": TREES,
    "safetensors.save.params": TREES | {"adapted params", "an adapted weight"},
    "ignore": {"an empty list", "an array of strings"},
    "max_shard_bytes": {"an int"},
    "names": set(),
    "folder": {"a string"},
    "base_model_name_or_path": {"None", "a string"},
    "platform": {"None"},
    "factors": ADAPTED_TREES,
    "FromWeight.factors": FUNCTIONS,
    "changes_base": {"a bool"},
    "data": {"None"},
    "pissa.iterations": {"None", "an int"},
    "iterations": {"an int"},
    **dict.fromkeys(("rho", "gamma"), NUMBERS),
    "rngs": {"a key"},
    "nnx.Adapted.rngs": {"None"},
    "module": {"an NNX module"},
    "method": FUNCTIONS,
}
