"""Products of matrices in the precision of their dtype, on every platform.

A TPU multiplies in bfloat16 and a GPU in TF32 unless a product asks for more, which is too coarse
for what is decomposed or inverted afterwards.
"""

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return ``x @ y``."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
