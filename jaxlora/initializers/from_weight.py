"""Initializers of both factors from the weight, whose product is taken out of the base.

Training starts from directions that matter, and the output stays what it was. How the product is
taken out is in `jaxlora.initializers.residual`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxlora.linalg import svd
from jaxlora.messages import checks
from jaxlora.weights import tree_checks


@dataclasses.dataclass(frozen=True, eq=False)
class FromWeight:
    """An initializer of both factors from the weight.

    Attributes:
        name: what adapters and errors call it.
        factors: a function ``(key, weight, rank, scaling) -> (a, b)`` of a float32 matrix
            ``(in, out)``; ``scaling * a b`` is taken out of the base.
        changes_base: the product is not zero.
        data: what the function gets behind the others, for each target one array for each entry of
            its stack, as from `jaxlora.calibration`; or None.
    """

    name: str
    factors: Callable[..., tuple[jax.Array, jax.Array]]
    changes_base: bool = True
    data: Mapping[str, jax.Array] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str: got {checks.shown(self.name)}")
        if not checks.is_function(self.factors):
            raise TypeError(
                "factors must be a function (key, weight, rank, scaling) -> (a, b): "
                f"got {checks.shown(self.factors)}"
            )
        checks.check_flag(self.changes_base, "changes_base")
        if self.data is not None:
            tree_checks.check_matrices(self.data, "data")


def pissa(iterations: int | None = None) -> FromWeight:
    """Return the start at the largest singular values (Meng et al. 2024, arXiv:2404.02948).

    Args:
        iterations: of the randomized decomposition (see the paper's appendix on fast SVD), at
            least 0, 8 being ample; None decomposes exactly, which takes much longer.

    Raises:
        TypeError: iterations is no int.
        ValueError: iterations is negative.

    >>> import jaxlora
    >>> jaxlora.LoRAConfig(rank=8, initializer=jaxlora.initializers.pissa(8)).initializer.name
    'pissa'
    """
    if iterations is not None:
        checks.check_count(iterations, "iterations", 0)

    def factors(key, weight, rank, scaling):
        if iterations is None:
            return svd.factors(svd.truncated(weight, rank), scaling)
        return svd.factors(svd.randomized(key, weight, rank, iterations), scaling)

    return FromWeight("pissa", factors)


def milora(
    key: jax.Array, weight: jax.Array, rank: int, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Start at the smallest singular values (Wang et al. 2024, arXiv:2406.09044)."""
    del key
    u, s, v = jnp.linalg.svd(weight, full_matrices=False)
    return svd.factors((u[:, -rank:], s[-rank:], v[-rank:]), scaling)


def olora(
    key: jax.Array, weight: jax.Array, rank: int, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Start at the first columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775).

    As PEFT's, it decomposes the transpose, ``(out, in)``, and does not divide by the scaling.
    """
    del key, scaling
    q, r = jnp.linalg.qr(weight.T)
    return r[:rank].T, q[:, :rank].T


def zero_a(
    key: jax.Array, weight: jax.Array, rank: int, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Start with ``a`` at zero and ``b`` uniform on ±1/√rank (Hayou et al. 2024, arXiv:2406.08447).

    The paper's Init[B]. With ``b`` at zero the first gradients go to ``b`` alone, and features
    ``x a`` that are random are what it learns from: that learns faster, and small differences, as
    those of sums in another order of devices, grow faster too. With ``a`` at zero a run is steadier
    and can be slower. Nothing is taken out of the base: the product is zero.
    """
    del scaling
    size, width = weight.shape
    b = jax.random.uniform(key, (rank, width), jnp.float32, -1, 1) / math.sqrt(rank)
    return jnp.zeros((size, rank), jnp.float32), b
