"""Truncated singular value decompositions of matrices and of products of skinny ones.

All take stacks of matrices, and return ``u (..., m, k)``, ``s (..., k)`` in falling order and
``v (..., k, n)`` with ``u * s @ v`` the best approximation of rank k (Eckart and Young 1936).
"""

import jax
import jax.numpy as jnp

from jaxlora.linalg import tall
from jaxlora.linalg.precise import matmul
from jaxlora.types import Leaf

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

    def closer(_, q):
        return jnp.linalg.qr(matmul(matrix, jnp.linalg.qr(matmul(matrix.mT, q))[0]))[0]

    start = jax.random.normal(key, (matrix.shape[1], count), matrix.dtype)
    q = jax.lax.fori_loop(0, iterations, closer, jnp.linalg.qr(matmul(matrix, start))[0])
    u, s, v = truncated(matmul(q.mT, matrix), rank)
    return matmul(q, u), s, v


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
    q, p = tall.qr(a)
    t, w = tall.qr(b.mT)
    u, s, v = truncated(matmul(p, w.mT), rank)
    return matmul(q, u), s, matmul(v, t.mT)


def values_of_product(a: Leaf, b: Leaf) -> Leaf:
    """Return the singular values ``(..., r)`` of ``a b``, see `of_product`, without vectors.

    Of arrays of NumPy they are computed by NumPy, in float64 as well.
    """
    p, w = (tall.r(x) for x in (a, b.mT))
    xp = a.__array_namespace__()
    values = xp.linalg.svd(matmul(p, w.mT), compute_uv=False)
    lacking = a.shape[-1] - values.shape[-1]  # where r is more than a side
    return xp.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, lacking)])
