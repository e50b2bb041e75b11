"""Products of matrices in the precision of their dtype, on every platform.

A TPU multiplies in bfloat16 and a GPU in TF32 unless a product asks for more, which is too coarse
for what is decomposed or inverted afterwards.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.types import Leaf


def matmul(x: Leaf, y: Leaf) -> Leaf:
    """Return ``x @ y``, of arrays of NumPy by NumPy."""
    if isinstance(x, np.ndarray):
        return x @ y
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
