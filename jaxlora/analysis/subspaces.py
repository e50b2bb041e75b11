"""How much the subspaces in which adapters act have in common, with each other or with weights."""

import dataclasses
import functools
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxlora.analysis import operands
from jaxlora.analysis.findings import Findings, register, told
from jaxlora.analysis.operands import Operand
from jaxlora.linalg import svd
from jaxlora.linalg.precise import matmul
from jaxlora.messages import checks
from jaxlora.types import PyTree

Side = Literal["in", "out"]
Of = Literal["product", "factor"]
_CALL = "similarity(first, second)"


@register
@dataclasses.dataclass(frozen=True, repr=False)
class Similarity(Findings[jax.Array]):
    """The similarity φ of subspaces by path, ``(*stack, r1, r2)``, in [0, 1].

    Attributes:
        random: what φ of two random subspaces is in the mean, by path, ``(r1, r2)``.
    """

    header = ("shape", "φ(1, 1)", "φ(r1, r2)", "random")

    random: dict[str, jax.Array]

    @property
    def normalized(self) -> dict[str, jax.Array]:
        """``(φ - random) / (1 - random)`` by path, ``(*stack, r1, r2)``.

        It is 0 as of random subspaces, and 1 where one holds the other; 0 where one is all there
        is.
        """
        return {path: _beyond(phi, self.random[path]) for path, phi in self.found.items()}

    def cells(self, path: str) -> tuple[str, ...]:
        """Return what the table says of a weight."""
        phi, random = self.found[path], self.random[path]
        numbers = (phi[..., 0, 0], phi[..., -1, -1], random[-1, -1])
        return (str(phi.shape), *map(told, numbers))


def similarity(
    first: PyTree, second: PyTree, side: Side = "in", *, of: Of = "product"
) -> Similarity:
    """Return how much the first i directions of one have in common with the first j of another.

    ``φ(i, j) = ||U_i^T V_j||² / min(i, j)`` in the Frobenius norm, with the first i and j left
    singular vectors of each: 1 where one subspace holds the other, 0 where they are orthogonal (Hu
    et al. 2021, arXiv:2106.09685, section 7.2 and appendix G). Two random subspaces of n dimensions
    have ``max(i, j) / n`` in the mean.

    Args:
        first: adapters by path, or a tree with adapted weights.
        second: the same, of other ranks perhaps; or a plain tree, the weights themselves, of which
            the directions with the largest singular values are compared, as many as first has.
        side: ``"in"`` for directions of what weights are multiplied by, ``"out"`` for those of what
            comes out.
        of: directions of ``"product"`` do not depend on how it is shared out to the factors. Those
            of ``"factor"``, a or b alone, are what the paper compares.

    Returns:
        φ by path, ``(*stack, r1, r2)``, for all ``i`` from 1 to r1 and ``j`` from 1 to r2.

    Raises:
        TypeError: first or second is of the wrong kind.
        ValueError: they have no path in common, or are for weights of other shapes there.
    """
    checks.check_choice(side, "side", get_args(Side))
    checks.check_choice(of, "of", get_args(Of))
    one, left_out = operands.read(first, None, _CALL, "first")
    if is_weights := not operands.is_trained(second):
        other, more = operands.on_base(first, second, _CALL, ("first", "second"))
    else:
        other, more = operands.read(second, None, _CALL, "second")
    alone = tuple(path for path in (*one, *other) if not (path in one and path in other))
    both = [path for path in one if path in other]
    if not both:
        raise ValueError(
            f"first and second must have a path in common: got {', '.join(one)} and "
            f"{', '.join(other)}"
        )
    for path in both:
        _check_alike(path, one[path], other[path])
    how = {"side": side, "of": of, "is_weights": is_weights}
    found = {path: operands.run(_similarity, one[path], other[path], **how) for path in both}
    random = {path: _random(one[path], phi, side) for path, phi in found.items()}
    return Similarity(found, tuple(dict.fromkeys((*left_out, *more, *alone))), random)


def _check_alike(path: str, one: Operand, other: Operand) -> None:
    """Raise if two adapters are for weights that cannot be the same."""
    first, second = one.adapter, other.adapter
    if (first.shape, first.roles) != (second.shape, second.roles):
        raise ValueError(
            f"first and second must be for one weight at {path!r}: got {first.shape} with "
            f"{first.roles} and {second.shape} with {second.roles}"
        )


@functools.partial(jax.jit, static_argnames=("side", "of", "is_weights"))
def _similarity(one: Operand, other: Operand, side: Side, of: Of, *, is_weights: bool) -> jax.Array:
    """Return φ of two adapters, or of an adapter and the weight of the other operand."""
    u = _directions(one, side, of)  # (*stack, n, r1)
    v = _top(other, u.shape[-1], side) if is_weights else _directions(other, side, of)
    squares = jnp.square(matmul(u.mT, v))
    summed = jnp.cumsum(jnp.cumsum(squares, -2), -1)  # of the first i and j
    least = jnp.minimum(*_indices(*summed.shape[-2:]))
    return jnp.minimum(summed / _as_entry_of(summed, least), 1)  # rounding may go beyond


def _directions(operand: Operand, side: Side, of: Of) -> jax.Array:
    """Return the left singular vectors ``(*stack, n, rank)`` of a product or of one factor."""
    a, b = operand.factors()
    if of == "factor":
        return svd.truncated(a if side == "in" else b.mT, a.shape[-1])[0]
    u, _, v = svd.of_product(a, b, a.shape[-1])
    return u if side == "in" else v.mT


def _top(operand: Operand, rank: int, side: Side) -> jax.Array:
    """Return the first singular vectors ``(*stack, n, rank)`` of a weight."""
    u, _, v = svd.truncated(operand.weight(), rank)
    return u if side == "in" else v.mT


def _random(operand: Operand, phi: jax.Array, side: Side) -> jax.Array:
    """Return the mean of φ of random subspaces."""
    roles, shape = operand.adapter.roles, operand.adapter.shape
    _, in_, out = map(math.prod, roles.sizes(shape))
    return jnp.maximum(*_indices(*phi.shape[-2:])) / (in_ if side == "in" else out)


def _indices(rows: int, columns: int) -> jax.Array:
    """Return i and j, from 1, of every element of a matrix, ``(2, rows, columns)``."""
    return 1 + jnp.indices((rows, columns)).astype(jnp.float32)


def _as_entry_of(stack: jax.Array, matrix: jax.Array) -> jax.Array:
    """Return a matrix with as many axes as a stack of such."""
    return matrix.reshape(*[1] * (stack.ndim - 2), *matrix.shape)


def _beyond(phi: jax.Array, random: jax.Array) -> jax.Array:
    """Return how far φ is from that of random subspaces, on the way to 1."""
    random = _as_entry_of(phi, random)
    left = 1 - random
    return jnp.where(left > 0, (phi - random) / jnp.where(left > 0, left, 1), 0)
