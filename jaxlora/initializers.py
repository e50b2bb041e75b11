"""How the factors start.

An initializer is a function ``(key, shape, dtype) -> a`` as in `jax.nn.initializers`, and any of
those will do; ``b`` starts at zero, so that a fresh adapter changes nothing. It is called for each
entry of a stack with ``shape = (in, rank)``, where ``in`` is the product of the weight's in axes,
so that fan-in means what it says.

A `FromWeight` makes both factors of the weight, and their product is taken out of the base, so that
training starts from the weight's own directions and the output stays what it was.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlora import svd

Initializer = Callable[..., Any]
InitializerName = Literal["uniform", "normal", "kaiming", "orthogonal", "pissa", "milora", "olora"]


@dataclasses.dataclass(frozen=True)
class FromWeight:
    """An initializer of both factors from the weight.

    Attributes:
        name: what adapters and errors call it.
        factors: a function ``(key, weight, rank, scaling) -> (a, b)`` of a float32 matrix
            ``(in, out)``; ``scaling * a b`` is taken out of the base.
    """

    name: str
    factors: Callable[[jax.Array, jax.Array, int, float], tuple[jax.Array, jax.Array]]


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


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw orthonormal columns, evenly among all (Saxe et al. 2014, arXiv:1312.6120)."""
    return jax.nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


def pissa(iterations: int | None = None) -> FromWeight:
    """Return the start at the largest singular values (Meng et al. 2024, arXiv:2404.02948).

    Args:
        iterations: of the randomized decomposition (see the paper's appendix on fast SVD), at
            least 0, 8 being ample; None decomposes exactly, which takes much longer.

    Raises:
        ValueError: iterations is negative.

    >>> import jaxlora
    >>> jaxlora.LoRAConfig(rank=8, initializer=jaxlora.initializers.pissa(8)).initializer.name
    'pissa'
    """
    if iterations is not None and iterations < 0:
        raise ValueError(f"iterations must be at least 0: got {iterations}")

    def factors(key, weight, rank, scaling):
        if iterations is None:
            return _of_svd(svd.truncated(weight, rank), scaling)
        return _of_svd(svd.randomized(key, weight, rank, iterations), scaling)

    return FromWeight("pissa", factors)


def _milora(key, weight, rank, scaling):
    """Start at the smallest singular values (Wang et al. 2024, arXiv:2406.09044)."""
    del key
    u, s, v = jnp.linalg.svd(weight, full_matrices=False)
    return _of_svd((u[:, -rank:], s[-rank:], v[-rank:]), scaling)


def _olora(key, weight, rank, scaling):
    """Start at the first columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775).

    As PEFT's, it decomposes the transpose, ``(out, in)``, and does not divide by the scaling.
    """
    del key, scaling
    q, r = jnp.linalg.qr(weight.T)
    return r[:rank].T, q[:, :rank].T


def _of_svd(decomposed: svd.SVD, scaling: float) -> tuple[jax.Array, jax.Array]:
    """Return factors whose product times the scaling is ``u s v``, the roots of s in each."""
    u, s, v = decomposed
    roots = jnp.sqrt(s / scaling)
    return u * roots[None], roots[:, None] * v


NAMED: dict[str, Initializer | FromWeight] = {
    "uniform": uniform,
    "normal": normal,
    "kaiming": kaiming,
    "orthogonal": orthogonal,
    "pissa": pissa(),
    "milora": FromWeight("milora", _milora),
    "olora": FromWeight("olora", _olora),
}
