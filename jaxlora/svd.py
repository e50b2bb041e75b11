"""Truncated singular value decompositions of matrices and of products of skinny ones.

All take stacks of matrices, and return ``u (..., m, k)``, ``s (..., k)`` in falling order and
``v (..., k, n)`` with ``u * s @ v`` the best approximation of rank k (Eckart and Young 1936).
"""

import jax
import jax.numpy as jnp

SVD = tuple[jax.Array, jax.Array, jax.Array]


def truncated(matrix: jax.Array, rank: int) -> SVD:
    """Return the largest singular values and vectors of a matrix ``(..., m, n)``."""
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], v[..., :rank, :]


def of_product(a: jax.Array, b: jax.Array, rank: int) -> SVD:
    """Return those of ``a b`` with ``a (..., m, r)`` and ``b (..., r, n)``, which is not formed.

    With ``a = q p`` and ``b^T = t w`` the product is ``q (p w^T) t^T``: what is decomposed is of
    size ``(r, r)``.
    """
    q, p = jnp.linalg.qr(a)
    t, w = jnp.linalg.qr(b.mT)
    u, s, v = truncated(p @ w.mT, rank)
    return q @ u, s, v @ t.mT
