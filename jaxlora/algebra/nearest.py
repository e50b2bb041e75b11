"""The method of `jaxlora.algebra.combine` that bounds the rank of the result."""

import dataclasses
from collections.abc import Sequence

from jaxlora.algebra.methods import Method, concatenated
from jaxlora.algebra.pruning import Rule
from jaxlora.linalg import matrices, svd
from jaxlora.linalg.precise import matmul
from jaxlora.messages import checks
from jaxlora.weights.adapters import Adapter


@dataclasses.dataclass(frozen=True)
class Svd(Method):
    """The nearest of a rank to the sum of the products.

    Attributes:
        rule: how dense products are summed; None for their weighted sum, which is not formed.
        rank: of the result, at least 1; None for the largest of the ranks.

    Raises:
        TypeError: rule is no rule, or rank no int.
        ValueError: rank is below 1.
    """

    rule: Rule | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and not isinstance(self.rule, Rule):
            raise TypeError(
                "rule must sum arrays, as jaxlora.algebra.Ties(density=0.5), or be None: "
                f"got {checks.shown(self.rule)}"
            )
        if self.rank is not None:
            checks.check_count(self.rank, "rank")

    def adapter(self, path: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """Return the adapter of the largest singular values of the sum."""
        rank = self.rank or max(adapter.rank for adapter in adapters)
        if self.rule is None:
            decomposed = svd.of_product(*concatenated(adapters, weights), rank)
        else:
            factors = [(x, *matrices.factors(x)) for x in adapters]
            products = [x.scaling * matmul(a, b) for x, a, b in factors]
            decomposed = svd.truncated(self.rule.summed(products, weights, path), rank)
        return matrices.adapter_of_svd(adapters[0], decomposed)
