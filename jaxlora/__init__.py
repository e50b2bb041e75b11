"""Pure-functional LoRA for any JAX or Flax model.

jaxlora traces a function of parameters once and knows from the program how every weight is used.
It splits the parameters into a frozen base and small trainable factors, runs
``x W + scaling * (x a) b`` wherever a weight is consumed, restricts the optimizer to the factors
and merges them back into plain weights.

>>> import jax, jax.numpy as jnp, jaxlora
>>> def model(params, x):
...     return jnp.tanh(x @ params["up"]) @ params["down"]
>>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
>>> x = jnp.ones((2, 4))
>>> config = jaxlora.LoRAConfig(rank=2, alpha=4)
>>> params = jaxlora.init(jax.random.key(0), model, params, x, config=config)
>>> y = jax.jit(jaxlora.lora(model))(params, x)
>>> plain = jaxlora.merge(params)
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlora import (
    algebra,
    analysis,
    calibration,
    formats,
    initializers,
    optim,
    planning,
    reports,
    targets,
    weights,
)
from jaxlora.messages import names as _names
from jaxlora.optim import freeze
from jaxlora.reports.counts import summary
from jaxlora.reports.usage import explain
from jaxlora.storage import export as _export  # noqa: F401  lets jax.export write nodes
from jaxlora.storage import serialization as _serialization  # noqa: F401  and Flax too
from jaxlora.storage.adapters import load_adapters, save_adapters
from jaxlora.storage.merged import save_merged
from jaxlora.targets.config import LoRAConfig
from jaxlora.targets.sites import find_sites
from jaxlora.targets.skipped import SkippedWeightWarning
from jaxlora.tracing.evaluator import MaterializationWarning
from jaxlora.tracing.transform import lora
from jaxlora.trees.adapting import init
from jaxlora.trees.binding import bind, split
from jaxlora.trees.dropout import dropout
from jaxlora.trees.masks import labels, mask
from jaxlora.trees.merging import merge, merge_error, unmerge
from jaxlora.trees.quantization import QuantizationConfig, dequantize, quantize
from jaxlora.version import __version__ as __version__
from jaxlora.weights.adapters import Adapter
from jaxlora.weights.nodes import LoRAWeight

if TYPE_CHECKING:
    from jaxlora import nnx


__all__ = [
    "Adapter",
    "LoRAConfig",
    "LoRAWeight",
    "MaterializationWarning",
    "QuantizationConfig",
    "SkippedWeightWarning",
    "algebra",
    "analysis",
    "bind",
    "calibration",
    "dequantize",
    "dropout",
    "explain",
    "find_sites",
    "formats",
    "freeze",
    "init",
    "initializers",
    "labels",
    "load_adapters",
    "lora",
    "mask",
    "merge",
    "merge_error",
    "nnx",
    "optim",
    "planning",
    "quantize",
    "reports",
    "save_adapters",
    "save_merged",
    "split",
    "summary",
    "targets",
    "unmerge",
    "weights",
]


def __getattr__(name: str) -> Any:
    """Import ``jaxlora.nnx`` where it is first used: it imports Flax, which the rest does not."""
    if name == "nnx":
        return importlib.import_module("jaxlora.nnx")
    raise AttributeError(_names.no_attribute("jaxlora", name, _names.public(globals())))


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
