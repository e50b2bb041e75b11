"""Sums of arrays of several adapters: weighted, pruned, and by the sign of the majority.

TIES is Yadav et al. 2023 (arXiv:2306.01708), DARE is Yu et al. 2023 (arXiv:2311.03099). The
formulas and names are those of PEFT, which prunes and counts votes before it weighs.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Rule = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]
Majority = Literal["total", "frequency"]


def combined(
    arrays: Sequence[jax.Array],
    weights: Sequence[float],
    rule: Rule,
    density: float = 1.0,
    majority: Majority = "total",
    key: jax.Array | None = None,
) -> jax.Array:
    """Return the sum of arrays of one shape.

    Args:
        arrays: one of each adapter.
        weights: one for each.
        rule: ``"linear"`` sums; ``"magnitude_prune"`` and ``"ties"`` keep the largest elements,
            ``"dare_..."`` random ones, scaled up; ``"..ties"`` sums, at each place, those with the
            sign of the majority, and divides by their number.
        density: share of the elements that is kept.
        majority: the sign of the sum, or that of more elements.
        key: random key, for what draws.
    """
    if rule.startswith("dare"):
        keys = jax.random.split(key, len(arrays))  # pyright: ignore[reportArgumentType]
        arrays = [_drawn(x, density, k) for x, k in zip(arrays, keys, strict=True)]
    elif rule != "linear":
        arrays = [_largest(x, density) for x in arrays]
    kept = jnp.stack(arrays)
    weighted = kept * jnp.asarray(weights, kept.dtype).reshape(-1, *[1] * (kept.ndim - 1))
    if not rule.endswith("ties"):
        return weighted.sum(0)
    agrees = _agrees(kept, majority).astype(kept.dtype)
    return (weighted * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)


def _largest(x: jax.Array, density: float) -> jax.Array:
    """Return x with all but the largest elements zero."""
    count = int(density * x.size)
    _, kept = jax.lax.top_k(jnp.abs(x).reshape(-1), count)
    mask = jnp.zeros(x.size, x.dtype).at[kept].set(1)
    return x * mask.reshape(x.shape)


def _drawn(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Return x with random elements zero and the others scaled up, equal to x in the mean."""
    return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)


def _agrees(arrays: jax.Array, majority: Majority) -> jax.Array:
    """Tell which elements of arrays ``(n, ...)`` have the sign of the majority of the n."""
    signs = jnp.sign(arrays)
    votes = (arrays if majority == "total" else signs).sum(0)
    return signs == jnp.where(votes >= 0, 1, -1)[None]
