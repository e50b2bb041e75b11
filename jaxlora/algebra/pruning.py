"""Rules that sum arrays of several adapters: weighted, pruned, and by the sign of the majority.

Each prunes every array, counts votes where it has any, and then weighs and sums. The formulas are
those of PEFT. A rule is a method of `jaxlora.algebra.combine`, for factors, and within
`jaxlora.algebra.Svd` it says how dense products are summed.
"""

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlora.algebra.methods import Method
from jaxlora.linalg import matrices
from jaxlora.messages import checks
from jaxlora.weights import paths
from jaxlora.weights.adapters import Adapter

Majority = Literal["total", "frequency"]


class Rule(Method):
    """How several arrays of one shape become one: they are pruned, weighted and summed.

    Of adapters it sums the factors, ``a`` and ``b`` apart, each times the square root of weight and
    scaling: a rough approximation of the sum of products, but of the same rank.
    """

    def __post_init__(self) -> None:
        """Check the fields; rules without any have nothing to check."""

    def prune(self, arrays: Sequence[jax.Array], name: str) -> Sequence[jax.Array]:
        """Return arrays ``(stack, ...)``, one of each adapter, with some elements zero."""
        return arrays

    def total(self, arrays: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the sum of pruned arrays ``(n, ...)`` with weights ``(n, 1, ...)``."""
        return (arrays * weights).sum(0)

    def summed(self, arrays: Sequence[jax.Array], weights: Sequence[float], name: str) -> jax.Array:
        """Return one array ``(stack, ...)`` for several; what is drawn depends on the name."""
        kept = jnp.stack(self.prune(arrays, name))
        shape = (-1, *[1] * (kept.ndim - 1))
        return self.total(kept, jnp.asarray(weights, kept.dtype).reshape(shape))

    def adapter(self, path: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
        """Return the adapter of summed factors."""
        ranks = [adapter.rank for adapter in adapters]
        if len(set(ranks)) > 1:
            name = type(self).__name__
            raise ValueError(f"the method {name} needs equal ranks: {path!r} has {ranks}")
        factors = [matrices.factors(adapter) for adapter in adapters]
        scaled = [w * x.scaling for w, x in zip(weights, adapters, strict=True)]
        roots = [math.sqrt(abs(weight)) for weight in scaled]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
        a = self.summed([a for a, _ in factors], signed, f"{path} a")
        b = self.summed([b for _, b in factors], roots, f"{path} b")
        return matrices.adapter_of(adapters[0], a, b)


@dataclasses.dataclass(frozen=True)
class _Largest(Rule):
    """A rule of the largest elements of each array, and of each entry of a stack."""

    density: float

    def __post_init__(self) -> None:
        checks.check_number(self.density, "density", "in (0, 1]")

    def prune(self, arrays: Sequence[jax.Array], name: str) -> Sequence[jax.Array]:
        """Return arrays with all but the largest elements zero."""
        return [jax.vmap(self._largest)(x) for x in arrays]

    def _largest(self, x: jax.Array) -> jax.Array:
        _, kept = jax.lax.top_k(jnp.abs(x).reshape(-1), int(self.density * x.size))
        mask = jnp.zeros(x.size, x.dtype).at[kept].set(1)
        return x * mask.reshape(x.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class _Drawn(Rule):
    """A rule of random elements of each array, scaled up, so that each is equal in the mean."""

    density: float
    key: jax.Array

    def __post_init__(self) -> None:
        checks.check_number(self.density, "density", "in (0, 1]")
        checks.check_key(self.key, f"{type(self).__name__}(density, key)")

    def prune(self, arrays: Sequence[jax.Array], name: str) -> Sequence[jax.Array]:
        """Return arrays with random elements zero and the others scaled up."""
        keys = jax.random.split(paths.random_key(self.key, name), len(arrays))
        return [self._drawn(x, key) for x, key in zip(arrays, keys, strict=True)]

    def _drawn(self, x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, self.density, x.shape), x / self.density, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Elected(Rule):
    """A rule that sums the elements with the sign of the majority, in front of one that prunes."""

    majority: Majority = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.check_choice(self.majority, "majority", typing.get_args(Majority))

    def total(self, arrays: jax.Array, weights: jax.Array) -> jax.Array:
        """Return the sum of the elements with the sign of the majority, over their number."""
        signs = jnp.sign(arrays)
        votes = (arrays if self.majority == "total" else signs).sum(0)
        agrees = (signs == jnp.where(votes >= 0, 1, -1)[None]).astype(arrays.dtype)
        return (arrays * weights * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)


@dataclasses.dataclass(frozen=True)
class Linear(Rule):
    """The weighted sum."""


@dataclasses.dataclass(frozen=True)
class MagnitudePruning(_Largest):
    """The weighted sum of the largest elements of each array.

    Attributes:
        density: share of the elements that is kept, in (0, 1].

    Raises:
        TypeError: density is no number.
        ValueError: density is out of its range.
    """


@dataclasses.dataclass(frozen=True)
class Ties(_Elected, _Largest):
    """TIES (Yadav et al. 2023, arXiv:2306.01708): of the largest elements, those of one sign.

    Those that have the sign of the majority are weighted and summed at each place, and divided by
    their number.

    Attributes:
        density: share of the elements that is kept, in (0, 1].
        majority: the sign of the sum (``"total"``), or that of more elements (``"frequency"``).

    Raises:
        TypeError: density is no number.
        ValueError: density is out of its range, or majority none of the two.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class DareLinear(_Drawn):
    """DARE (Yu et al. 2023, arXiv:2311.03099): the weighted sum of random elements, scaled up.

    Attributes:
        density: chance of each element to be kept, in (0, 1]; what is kept is divided by it.
        key: random key. Each weight draws with one of its own, made of this and its path.

    Raises:
        TypeError: density is no number, or key no random key.
        ValueError: density is out of its range.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class DareTies(_Elected, _Drawn):
    """DARE's random elements, of which those of one sign are summed as by `Ties`.

    Attributes:
        density: chance of each element to be kept, in (0, 1]; what is kept is divided by it.
        key: random key. Each weight draws with one of its own, made of this and its path.
        majority: the sign of the sum (``"total"``), or that of more elements (``"frequency"``).

    Raises:
        TypeError: density is no number, or key no random key.
        ValueError: density is out of its range, or majority none of the two.
    """
