"""QR decompositions of matrices with many more rows than columns, as factors are.

The rows are decomposed in blocks, and then what that leaves of the blocks (TSQR, Demmel et al.
2012, arXiv:0806.2159, section 2). So rows that are sharded over devices stay there: what is
gathered is of the size of the columns.
"""

import math

import jax
import jax.numpy as jnp

from jaxlora.linalg.precise import matmul
from jaxlora.types import Leaf

_HEIGHT = 4  # a block has at least so many times as many rows as columns


def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ``q (..., m, k)`` and ``r (..., k, n)`` of a matrix ``(..., m, n)``, k the smaller."""
    if (count := _count(*matrix.shape[-2:])) == 1:
        q, r = jnp.linalg.qr(matrix)
        return q, r
    blocks = _in_blocks(matrix, count)
    inner, left = jnp.linalg.qr(blocks)
    outer, r = jnp.linalg.qr(left.reshape(*matrix.shape[:-2], -1, matrix.shape[-1]))
    return matmul(inner, outer.reshape(left.shape)).reshape(matrix.shape), r


def r(matrix: Leaf) -> Leaf:
    """Return ``r (..., k, n)`` of `qr` alone, of an array of JAX or of NumPy."""
    xp = matrix.__array_namespace__()
    if (count := _count(*matrix.shape[-2:])) > 1:
        left = xp.linalg.qr(_in_blocks(matrix, count), mode="r")
        matrix = left.reshape(*matrix.shape[:-2], -1, matrix.shape[-1])
    return xp.linalg.qr(matrix, mode="r")


def _count(rows: int, columns: int) -> int:
    """Return the number of blocks: a power of 2, so that most numbers of devices divide it."""
    most = max(1, rows // (_HEIGHT * columns))
    return math.gcd(rows, 2 ** (most.bit_length() - 1))


def _in_blocks(matrix: Leaf, count: int) -> Leaf:
    *stack, rows, columns = matrix.shape
    return matrix.reshape(*stack, count, rows // count, columns)
