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


def randomized(key: jax.Array, matrix: jax.Array, rank: int, iterations: int) -> SVD:
    """Return nearly the largest singular values and vectors, by products with the matrix alone.

    Subspace iteration on ``min(2 rank, m, n)`` random vectors (Halko et al. 2011, arXiv:0909.4061,
    algorithm 4.4 and section 5.1): ``2 iterations + 2`` products instead of a decomposition.

    Args:
        key: random key.
        matrix: ``(m, n)``.
        rank: number of singular values.
        iterations: more come nearer, above all where singular values fall slowly.
    """
    count = min(2 * rank, *matrix.shape)

    def times(x, y):
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    def closer(_, q):
        return jnp.linalg.qr(times(matrix, jnp.linalg.qr(times(matrix.mT, q))[0]))[0]

    start = jax.random.normal(key, (matrix.shape[1], count), matrix.dtype)
    q = jax.lax.fori_loop(0, iterations, closer, jnp.linalg.qr(times(matrix, start))[0])
    u, s, v = truncated(times(q.mT, matrix), rank)
    return times(q, u), s, v


def factors(decomposed: SVD, scaling: float) -> tuple[jax.Array, jax.Array]:
    """Return factors whose product times the scaling is ``u * s @ v``, the roots of s in each."""
    u, s, v = decomposed
    roots = jnp.sqrt(s / scaling)
    return u * roots[..., None, :], roots[..., None] * v


def of_product(a: jax.Array, b: jax.Array, rank: int) -> SVD:
    """Return those of ``a b`` with ``a (..., m, r)`` and ``b (..., r, n)``, which is not formed.

    With ``a = q p`` and ``b^T = t w`` the product is ``q (p w^T) t^T``: what is decomposed is of
    size ``(r, r)``.
    """
    q, p = jnp.linalg.qr(a)
    t, w = jnp.linalg.qr(b.mT)
    u, s, v = truncated(p @ w.mT, rank)
    return q @ u, s, v @ t.mT
