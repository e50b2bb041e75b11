"""The transform: trace a program, follow the weights through it, evaluate it with low-rank ones.

Only this folder knows jaxprs. Importing it registers the rules.
"""

from jaxlora.tracing import (
    arithmetic,
    contraction,
    control,
    convolution,
    indexing,
    loops,
    spmd,
    structural,
)
from jaxlora.tracing.cost import Cost
from jaxlora.tracing.interpreter import Evaluator, MaterializationWarning
from jaxlora.tracing.recorder import CONTRACTED, LOOKED_UP, MATERIALIZED, Recorder, Use
from jaxlora.tracing.transform import is_array, lora, observe, trace, values

__all__ = [
    "CONTRACTED",
    "LOOKED_UP",
    "MATERIALIZED",
    "Cost",
    "Evaluator",
    "MaterializationWarning",
    "Recorder",
    "Use",
    "arithmetic",
    "contraction",
    "control",
    "convolution",
    "indexing",
    "is_array",
    "loops",
    "lora",
    "observe",
    "spmd",
    "structural",
    "trace",
    "values",
]
