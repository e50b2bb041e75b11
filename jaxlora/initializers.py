"""How the factor ``a`` starts; ``b`` starts at zero, so that a fresh adapter changes nothing.

An initializer is a function ``(key, shape, dtype) -> array`` as in `jax.nn.initializers`, and
any of those will do. It is called for each entry of a stack with ``shape = (in, rank)``, where
``in`` is the product of the weight's in axes, so that fan-in means what it says.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Initializer = Callable[..., Any]
InitializerName = Literal["uniform", "normal", "kaiming"]


def uniform(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution on ±1/√in, the default of loralib and PEFT."""
    # one product, last: with one rounding the bits are the same however operations are fused
    return jax.random.uniform(key, shape, dtype, -1, 1) * (1 / math.sqrt(shape[0]))


def normal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from the normal distribution with standard deviation 1/rank, PEFT's "gaussian"."""
    return jax.random.normal(key, shape, dtype) / shape[1]


def kaiming(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution on ±√(6/in) (He et al. 2015, arXiv:1502.01852)."""
    return jax.nn.initializers.he_uniform()(key, shape, dtype)


NAMED: dict[str, Initializer] = {"uniform": uniform, "normal": normal, "kaiming": kaiming}
