"""The factors of an adapter as matrices of float64, and what is computed of them alone."""

import dataclasses
import functools
import math

import numpy as np

from jaxlora.linalg import svd
from jaxlora.weights.adapters import Adapter, Replacement

_ROUNDING = 1e-12  # of float64, beside a share


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The factors of an adapter, one pair for each entry of its stack.

    Attributes:
        a: ``(stack, in, rank)``.
        b: ``(stack, rank, out)``, times the scaling.
    """

    a: np.ndarray
    b: np.ndarray

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> "Matrices":
        """Return the matrices of an adapter, whose scaling ``b`` takes."""
        a, b = (np.asarray(x).astype(np.float64) for x in (adapter.a, adapter.b))
        stack = math.prod(a.shape[: len(adapter.roles.stack)])
        a, b = a.reshape(stack, -1, adapter.rank), b.reshape(stack, adapter.rank, -1)
        return cls(a, b * adapter.scaling)

    def minus(self, other: "Matrices") -> "Matrices":
        """Return the factors of the difference of two products, of the sum of their ranks."""
        a = np.concatenate([self.a, other.a], -1)
        return Matrices(a, np.concatenate([self.b, -other.b], -2))

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The singular values ``(stack, rank)`` of the product, falling."""
        return svd.values_of_product(self.a, self.b)

    def norm(self) -> float:
        """Return the Frobenius norm of the product."""
        return float(np.linalg.norm(self.values))

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """For each rank, from 1 on, the least share of a squared norm that it keeps, ``(rank,)``.

        That of a product which is zero is 1.
        """
        sums = (self.values**2).cumsum(-1)
        total = sums[..., -1:]
        shares = sums / np.where(total > 0, total, 1)
        return np.where(total > 0, shares, 1.0).min(0)

    def rank_of_energy(self, share: float) -> int:
        """Return the least rank that keeps a share of the squared norm of every product."""
        return int((self.kept >= share * (1 - _ROUNDING)).argmax()) + 1

    def energy(self, rank: int) -> float:
        """Return the least share of the squared norm of a product that a rank keeps."""
        return float(self.kept[rank - 1])

    def dead(self) -> int:
        """Return how many directions, of all entries, add nothing: ``a`` or ``b`` is zero there."""
        is_alive = (self.a != 0).any(-2) & (self.b != 0).any(-1)
        return int((~is_alive).sum())


def not_finite(term: Adapter | Replacement) -> list[str]:
    """Return the names of the arrays that hold NaN or inf."""
    arrays = {name: np.asarray(x).astype(np.float64) for name, x in term.trained().items()}
    return [name for name, array in arrays.items() if not np.isfinite(array).all()]
