"""How the factors start.

The first four draw ``a`` at random, and ``b`` starts at zero: a fresh adapter changes nothing. The
others make both factors of the weight, or of data and the weight, and their product is taken out of
the base, so that training starts from directions that matter and the output stays what it was.
"""

from jaxlora.initializers.from_data import corda, eva, eva_ranks, lora_ga
from jaxlora.initializers.from_rounding import LoftQ, loftq
from jaxlora.initializers.from_weight import FromWeight, pissa
from jaxlora.initializers.random import kaiming, normal, orthogonal, uniform

__all__ = [
    "FromWeight",
    "LoftQ",
    "corda",
    "eva",
    "eva_ranks",
    "kaiming",
    "loftq",
    "lora_ga",
    "normal",
    "orthogonal",
    "pissa",
    "uniform",
]
