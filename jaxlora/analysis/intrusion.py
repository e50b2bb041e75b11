"""Singular vectors of adapted weights that are like none of the base: intruder dimensions."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.analysis import operands
from jaxlora.analysis.findings import Findings, register, told
from jaxlora.analysis.operands import Operand
from jaxlora.linalg import matrices, meshes, svd
from jaxlora.linalg.precise import matmul
from jaxlora.messages import checks
from jaxlora.types import PyTree
from jaxlora.weights import tree_checks
from jaxlora.weights.adapters import Adapter, Adapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intrusion:
    """The first singular vectors of an adapted weight, on its out side, beside those of its base.

    Attributes:
        values: singular values of the adapted weight, ``(*stack, k)``, falling.
        likeness: the largest absolute cosine of each vector with one of the base, ``(*stack, k)``.
        found: which of the vectors are intruders, ``(*stack, k)`` of bools.
    """

    values: jax.Array
    likeness: jax.Array
    found: jax.Array

    @property
    def count(self) -> jax.Array:
        """Number of intruders, ``(*stack,)``."""
        return self.found.sum(-1)


@register
@dataclasses.dataclass(frozen=True, repr=False)
class Intruders(Findings[Intrusion]):
    """What of each adapted weight intrudes."""

    header = ("vectors", "intruders", "least like the base")

    def cells(self, path: str) -> tuple[str, ...]:
        """Return what the table says of a weight."""
        found = self.found[path]
        count = told(found.count, ".0f")
        return (str(found.values.shape[-1]), count, told(found.likeness.min(-1)))


def intruders(base: PyTree, adapters: Adapters, k: int = 10, epsilon: float = 0.5) -> Intruders:
    """Return which of the first singular vectors of each adapted weight the base does not have.

    A vector is an intruder if its cosine with every singular vector of the base is below epsilon
    (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1). Full fine-tuning makes few; adapters
    of a small rank make some, and forget more of what the base can do the more they have. Vectors
    are those of the out side. Two decompositions of each weight are computed, one weight at a time.

    Args:
        base: the weights that adapters are for, a plain tree.
        adapters: factors by path, with or without magnitudes.
        k: how many vectors are looked at, at least 1; at most the smaller side of a weight.
        epsilon: the cosine below which a vector is like none of the base, in (0, 1].

    Returns:
        An `Intrusion` by path.

    Raises:
        TypeError: base is no tree of weights, adapters no adapters, k no int, epsilon no number.
        ValueError: there are none with factors, they do not fit the base, k is below 1 or epsilon
            out of its range.
    """
    found, left_out = _read(base, adapters, "intruders(base, adapters)", k, epsilon)
    looked = {path: _look(operand, k, epsilon)[0] for path, operand in found.items()}
    return Intruders(looked, left_out)


def without_intruders(
    base: PyTree, adapters: Adapters, k: int = 10, epsilon: float = 0.5
) -> Adapters:
    """Return the adapters without what they add to intruders, see `intruders`.

    Of an adapted weight with intruders ``u s v^T`` these are taken off whole, so that what is
    merged is ``W + product - sum(u s v^T)``. The adapter gets so many more columns, as the entry of
    its stack with most of them needs; others stay as they are.

    Args:
        base: the weights that adapters are for, a plain tree.
        adapters: factors by path, without magnitudes.
        k: how many vectors are looked at, at least 1.
        epsilon: the cosine below which a vector is like none of the base, in (0, 1].

    Returns:
        Adapters by path; those that are altered have scaling 1.

    Raises:
        TypeError: as for `intruders`, or it is called inside of `jax.jit`: how many intruders there
            are is a value.
        ValueError: as for `intruders`, or an adapter has a magnitude.
    """
    call = "without_intruders(base, adapters)"
    found, _ = _read(base, adapters, call, k, epsilon)
    tree_checks.check_untraced(call, (base, adapters))
    matrices.check_linear({path: operand.adapter for path, operand in found.items()})
    return {
        path: _without(term, found[path], k, epsilon) if path in found else term
        for path, term in adapters.items()
    }


def _read(
    base: PyTree, adapters: Adapters, call: str, k: int, epsilon: float
) -> tuple[dict[str, Operand], tuple[str, ...]]:
    tree_checks.check_adapters(adapters, some=True)
    checks.check_count(k, "k")
    checks.check_number(epsilon, "epsilon", "in (0, 1]")
    return operands.on_base(adapters, base, call)


def _look(operand: Operand, k: int, epsilon: float) -> tuple[Intrusion, jax.Array, jax.Array]:
    """Return what intrudes, and the first vectors ``u (*stack, in, k)``, ``v (*stack, k, out)``."""
    return operands.run(_compared, operand, k=k, epsilon=epsilon)


@functools.partial(jax.jit, static_argnames=("k", "epsilon"))
def _compared(operand: Operand, *, k: int, epsilon: float) -> Any:
    _, _, before = svd.truncated(operand.weight(), min(operand.weight().shape[-2:]))
    u, s, v = svd.truncated(operand.merged(), k)
    likeness = jnp.max(jnp.abs(matmul(v, before.mT)), -1)
    return Intrusion(s, likeness, likeness < epsilon), u, v


def _without(term: Adapter, operand: Operand, k: int, epsilon: float) -> Adapter:
    """Return an adapter that also takes the intruders off."""
    found, u, v = _look(operand, k, epsilon)
    if not (most := int(found.count.max())):
        return term
    stack = len(term.roles.stack)
    joined = meshes.run(_joined, (operand, found, u, v), stack=stack, most=most)
    return matrices.adapter_of(term, *joined)


@functools.partial(jax.jit, static_argnames="most")
def _joined(
    operand: Operand, found: Intrusion, u: jax.Array, v: jax.Array, *, most: int
) -> tuple[jax.Array, jax.Array]:
    """Return factors with so many more columns, for what intrudes and otherwise zero."""
    first = jnp.argsort(~found.found, axis=-1, stable=True)[..., :most]  # intruders before others
    values = jnp.take_along_axis(jnp.where(found.found, found.values, 0), first, -1)
    u = jnp.take_along_axis(u, first[..., None, :], -1) * values[..., None, :]
    v = jnp.take_along_axis(v, first[..., None], -2)
    a, b = operand.factors()
    return jnp.concatenate([a, -u], -1), jnp.concatenate([b, v], -2)
