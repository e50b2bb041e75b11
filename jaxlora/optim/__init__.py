"""Optimizers for the factors: restricted to them, and with a treatment of their own for each.

All are optax transforms and chain with any other. Those that tell the factors apart take adapters
from `jaxlora.split`, a tree with `LoRAWeight` nodes inside `freeze`, or the factors of a
`jaxlora.nnx.Adapted`.

Optax is imported where it is used, so that importing this library takes little more than JAX.
"""

from jaxlora.optim.by_factor import decay_factors, scale_rates
from jaxlora.optim.freezing import freeze
from jaxlora.optim.preconditioning import precondition

__all__ = ["decay_factors", "freeze", "precondition", "scale_rates"]
