"""The types in which evaluations and rules are written."""

from collections.abc import Sequence

import jax

from jaxlora.tracing.jaxprs.compat import Eqn, Jaxpr, Params, Traced
from jaxlora.tracing.values.deferred import Base, Deferred
from jaxlora.tracing.values.weight import Weight

Operand = jax.Array | Weight  # of a rule that does not pass on what is deferred
Value = Operand | Deferred
Values = Sequence[Value]

__all__ = ["Base", "Eqn", "Jaxpr", "Operand", "Params", "Traced", "Value", "Values"]
