"""The transform: trace a program, follow the weights through it, evaluate it with low-rank ones.

Only this folder knows jaxprs. Importing it registers the rules.
"""

from jaxlora.tracing import (
    arithmetic,
    contraction,
    control,
    convolution,
    indexing,
    spmd,
    structural,
)
from jaxlora.tracing.cost import Cost
from jaxlora.tracing.interpreter import (
    CONTRACTED,
    LOOKED_UP,
    MATERIALIZED,
    MaterializationWarning,
    Use,
    Walk,
)
from jaxlora.tracing.transform import is_array, lora, observe, trace, values

__all__ = [
    "CONTRACTED",
    "LOOKED_UP",
    "MATERIALIZED",
    "Cost",
    "MaterializationWarning",
    "Use",
    "Walk",
    "arithmetic",
    "contraction",
    "control",
    "convolution",
    "indexing",
    "is_array",
    "lora",
    "observe",
    "spmd",
    "structural",
    "trace",
    "values",
]
