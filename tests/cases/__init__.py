"""The list of programs that every law is tried on. A new case is one function in this folder.

A case is a function marked with `case` that returns a `Case`; its name is the function's.
``tokens`` is for each target the number of rows that its factors are applied to, for the law on
operations.
"""

from cases import control, experts, layers_linen, layers_nnx, products, reading
from cases.base import CASES, Case, normal

__all__ = [
    "CASES",
    "Case",
    "control",
    "experts",
    "layers_linen",
    "layers_nnx",
    "normal",
    "products",
    "reading",
]
