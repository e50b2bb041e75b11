"""The initializers that have names, and the types of all."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from jaxlora.initializers.from_weight import FromWeight, milora, olora, pissa, zero_a
from jaxlora.initializers.random import kaiming, normal, orthogonal, uniform
from jaxlora.types import Function

Initializer = Function

InitializerName = Literal[
    "uniform", "normal", "kaiming", "orthogonal", "zero_a", "pissa", "milora", "olora"
]

NAMED: Mapping[str, Initializer | FromWeight] = MappingProxyType(
    {
        "uniform": uniform,
        "normal": normal,
        "kaiming": kaiming,
        "orthogonal": orthogonal,
        "zero_a": FromWeight("zero_a", zero_a, changes_base=False),
        "pissa": pissa(),
        "milora": FromWeight("milora", milora),
        "olora": FromWeight("olora", olora),
    }
)
