"""Methods of `jaxlora.algebra.combine`: how several adapters of one weight become one."""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.linalg import matrices
from jaxlora.weights.adapters import Adapter


class Method(abc.ABC):
    """How several adapters of one weight become one; to have another, make a subclass."""

    @abc.abstractmethod
    def adapter(self, path: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """Return one adapter, with scaling 1.

        Args:
            path: name of the weight, or of the part of it that the adapters are for.
            adapters: of one weight, at least one.
            weights: one for each.
        """


@dataclasses.dataclass(frozen=True)
class Concatenation(Method):
    """The weighted sum of the products, exactly; ranks add up."""

    def adapter(self, path: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """Return the adapter of concatenated factors."""
        return matrices.adapter_of(adapters[0], *concatenated(adapters, weights))


def concatenated(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Return ``a (stack, in, ranks)`` and ``b (stack, ranks, out)`` of the sum of products."""
    factors = [matrices.factors(adapter) for adapter in adapters]
    scaled = [w * x.scaling for w, x in zip(weights, adapters, strict=True)]
    a = jnp.concatenate([w * a for w, (a, _) in zip(scaled, factors, strict=True)], -1)
    return a, jnp.concatenate([b for _, b in factors], -2)
