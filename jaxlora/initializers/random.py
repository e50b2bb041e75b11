"""Initializers that draw ``a`` at random; ``b`` starts at zero, so that nothing changes at first.

They are functions ``(key, shape, dtype) -> a`` as those of `jax.nn.initializers`, any of which will
do. Each is called for each entry of a stack with ``shape = (in, rank)``, where ``in`` is the
product of the weight's in axes, so that fan-in means what it says.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlora.messages import checks


def uniform(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution on ±1/√in, the default of loralib and PEFT."""
    _check("uniform", key, shape, dtype)
    # one product, last: with one rounding the bits are the same however operations are fused
    return jax.random.uniform(key, shape, dtype, -1, 1) * (1 / math.sqrt(shape[0]))


def normal(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw from the normal distribution with standard deviation 1/rank, PEFT's "gaussian"."""
    _check("normal", key, shape, dtype)
    return jax.random.normal(key, shape, dtype) / shape[1]


def kaiming(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution on ±√(6/in) (He et al. 2015, arXiv:1502.01852)."""
    _check("kaiming", key, shape, dtype)
    return jax.nn.initializers.he_uniform()(key, shape, dtype)


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw orthonormal columns, evenly among all (Saxe et al. 2014, arXiv:1312.6120)."""
    _check("orthogonal", key, shape, dtype)
    return jax.nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


def _check(name: str, key: object, shape: Sequence[int], dtype: DTypeLike) -> None:
    """Raise for wrong arguments of an initializer of ``a``."""
    checks.check_key(key, f"{name}(key, shape, dtype)")
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise TypeError(f"shape must be a pair (in, rank): got {checks.shown(shape)}")
    for i, size in enumerate(shape):
        checks.check_count(size, f"shape[{i}]")
    checks.check_dtype(dtype, "dtype")
