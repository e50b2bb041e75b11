"""Calls of `jaxlora.planning` in which something wrong may stand, and where it is not wrong."""

import jax.numpy as jnp
import optax
from cases import normal

import jaxlora
from jaxlora import planning

PARAMS = {"up": normal(1, 8, 6), "down": normal(2, 6, 8)}
X = normal(0, 5, 8)
SETTINGS = {"config": jaxlora.LoRAConfig(rank=2), "optimizer": optax.sgd(1.0)}


def loss(params, x):
    return jnp.sum(x @ params["up"] @ params["down"])


CALLS = {
    "planning.plan": (
        planning.plan,
        {"fn": loss, "params": PARAMS, "x": X},
        SETTINGS | {"mesh": None, "shardings": None},
    ),
    "planning.count": (planning.count, {"weights": {"up": (8, 6)}, "rank": 2}, {}),
    "planning.recommend": (
        planning.recommend,
        {},
        {
            "parameters": 7e9,
            "tokens": 1e6,
            "examples": 10,
            "task": "simple",
            "rules": planning.RULES,
        },
    ),
    "planning.Rules": (planning.Rules, {}, vars(planning.RULES)),
}
NUMBERS = {"an int", "a float"}
FITTING = {
    "mesh": {"None"},
    "shardings": {"None"},
    "parameters": NUMBERS,
    "tokens": {"None", *NUMBERS},
    "examples": {"None", "an int"},
    **{name: {"an int"} for name in ("few_examples", "many_examples", "rank_step")},
    **{name: NUMBERS for name in ("rate_ratio", "bits_per_parameter", "bits_per_token")},
    **{name: NUMBERS for name in ("width_power", "width_divisor")},
}
