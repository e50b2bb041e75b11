"""A start that makes up for what quantizing has rounded (LoftQ, Li et al. 2023, arXiv:2310.08659).

It looks for codes and factors whose sum is nearest to the weight before it was quantized, by turns
(algorithm 1)::

    Q = quantize(W - scaling * a b)        a b = the first singular vectors of (W - Q) / scaling
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxlora.linalg import matrices, svd
from jaxlora.messages import checks
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import memory, paths, placed, quantized, sharding, tree_checks
from jaxlora.weights.adapters import Adapter, scaling
from jaxlora.weights.quantized import QuantizedWeight
from jaxlora.weights.roles import Roles, factor_axes
from jaxlora.weights.target import Target


@dataclasses.dataclass(frozen=True, eq=False)
class LoftQ:
    """An initializer that makes up for quantizing, see `jaxlora.initializers.loftq`.

    Attributes:
        weights: the weights by path, as they were.
        iterations: how often the codes and the factors take turns.
    """

    weights: Mapping[str, Leaf]
    iterations: int = 1


def loftq(params: PyTree, *, iterations: int = 1) -> LoftQ:
    """Return the start that makes up for what quantizing has rounded.

    The codes are made anew and the factors with them, so that their sum is nearest to the weight as
    it was (Li et al. 2023, arXiv:2310.08659). It is for weights from `jaxlora.quantize` alone.

    Args:
        params: the tree before it was quantized; its targets are read.
        iterations: how often the codes and the factors take turns, at least 1.

    Raises:
        TypeError: params is no tree of weights, or iterations no int.
        ValueError: iterations is below 1.
    """
    iterations = checks.check_count(iterations, "iterations")
    return LoftQ(tree_checks.check_tree(params, "loftq(params, iterations=1)"), iterations)


class _How(NamedTuple):
    """What has to be known to start one weight."""

    iterations: int
    rank: int
    alpha: float
    roles: Roles
    dtype: DTypeLike


def start(
    target: Target, base: Leaf, roles: Roles, initializer: LoftQ, dtype: DTypeLike
) -> tuple[QuantizedWeight, Adapter]:
    """Return a quantized weight with new codes, and the adapter that makes up for their rounding.

    Args:
        target: the weight.
        base: the weight, quantized.
        roles: roles of its axes.
        initializer: holds the weight as it was.
        dtype: dtype of the factors.

    Raises:
        ValueError: the base is not quantized, or the target a part of one; there is no weight as it
            was, of other shape or not finite.
    """
    path, block, rank, alpha = target
    if not isinstance(base, QuantizedWeight):
        raise ValueError(
            f"'loftq' makes up for quantizing, and {target.name!r} is {base.dtype}: quantize "
            "it before, with jaxlora.quantize"
        )
    if block is not None:
        raise ValueError(f"'loftq' starts whole weights: got a part, {target.name!r}")
    if path not in initializer.weights:
        near = paths.nearest(path, initializer.weights)
        raise ValueError(f"'loftq' has no weight {path!r} as it was; {near}")
    weight = initializer.weights[path]
    if paths.is_node(weight) or not hasattr(weight, "__array__"):
        raise ValueError(f"'loftq' starts from the weight as it was: {path!r} is {weight}")
    if tuple(weight.shape) != base.shape:
        raise ValueError(
            f"the weight {path!r} as it was must have the shape {base.shape}: got {weight}"
        )
    how = _How(initializer.iterations, rank, alpha, roles, dtype)
    axes = (sharding.even_axes(base, base), *factor_axes(roles)[:2], ())
    made, a, b, finite = placed.run(_alternated, how, (weight, base), base, axes)
    if not isinstance(finite, Tracer) and not finite:
        raise ValueError(f"'loftq' needs finite values: {path!r} holds NaN or inf")
    return memory.beside(base, made), Adapter(a, b, roles, alpha, base.shape, changed="loftq")


def _alternated(weight: jax.Array, base: QuantizedWeight, how: _How) -> tuple[Leaf, ...]:
    """Return the quantized weight, the factors, and whether all are finite."""
    iterations, rank, alpha, roles, dtype = how
    exact = weight.astype(jnp.float32)
    shapes = roles.factor_shapes(weight.shape, rank)
    a, b = (jnp.zeros(shape, dtype) for shape in shapes)
    for _ in range(iterations):
        delta = Adapter(a, b, roles, alpha, base.shape).delta(base)
        base = quantized.again(exact - delta, base)
        rest = matrices.of_weight(exact - quantized.values(base).astype(jnp.float32), roles)
        factors = svd.factors(svd.truncated(rest, rank), scaling(alpha, rank))
        a, b = (x.reshape(shape).astype(dtype) for x, shape in zip(factors, shapes, strict=True))
    return base, a, b, jnp.isfinite(exact).all()
