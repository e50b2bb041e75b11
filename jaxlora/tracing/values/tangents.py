"""What the derivatives of products ask of tangents."""

from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def moves(tangent: object) -> TypeGuard[jax.Array]:
    """Tell whether a tangent is not known to be zero."""
    return not isinstance(tangent, SymbolicZero)


def summed(parts: Sequence[jax.Array], y: jax.Array) -> jax.Array:
    """Return the sum of the parts of a tangent of y, zeros if there are none."""
    return sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)
