"""Sums, parts and reductions of adapters; every function returns new adapters.

The product of an adapter, ``scaling * a b``, is what is added to its weight. Functions here say
what becomes of that product; how it is shared out to ``a`` and ``b`` is theirs to choose.
"""

from jaxlora.algebra.arithmetic import delta, pad, scale, truncate
from jaxlora.algebra.combining import add, combine
from jaxlora.algebra.extraction import Extracted, extract
from jaxlora.algebra.methods import Concatenation, Method
from jaxlora.algebra.nearest import Svd
from jaxlora.algebra.pruning import DareLinear, DareTies, Linear, MagnitudePruning, Rule, Ties
from jaxlora.algebra.rebasing import rebase

__all__ = [
    "Concatenation",
    "DareLinear",
    "DareTies",
    "Extracted",
    "Linear",
    "MagnitudePruning",
    "Method",
    "Rule",
    "Svd",
    "Ties",
    "add",
    "combine",
    "delta",
    "extract",
    "pad",
    "rebase",
    "scale",
    "truncate",
]
