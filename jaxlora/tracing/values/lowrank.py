"""The value that flows through a program in the place of an adapted weight.

Beside the base it has the factors, shaped along. Each has one axis for each piece of a role that it
carries, in the order of the pieces, and ``a`` and ``b`` have the rank as their last axis. So an
operation on one dimension of the weight is an operation on one axis of the factors that carry it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlora.tracing.values import axes, deferred, placement
from jaxlora.tracing.values.chain import contract, scaled
from jaxlora.tracing.values.scaling import scaled_along
from jaxlora.tracing.values.weight import Operation, Role, Weight
from jaxlora.weights.adapters import scaling

_IN, _OUT = frozenset({Role.STACK, Role.IN}), frozenset({Role.STACK, Role.OUT})
CARRIES = MappingProxyType({"a": _IN, "b": _OUT, "keys": frozenset({Role.STACK}), "gain": _OUT})
RANK = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Weight):
    """An adapted weight on its way through a program; its labels are roles.

    Attributes:
        a: ``(*stack and in pieces, rank)``.
        b: ``(*stack and out pieces, rank)``.
        keys: dropout keys, ``(*stack pieces,)``, or None.
        gain: what scales the columns of the base and the product, ``(*stack and out pieces,)``, or
            None.
    """

    carries: ClassVar[Mapping[str, frozenset[Role]]] = CARRIES

    a: jax.Array
    b: jax.Array
    keys: jax.Array | None = None
    gain: jax.Array | None = None

    @property
    def rank(self) -> int:
        """Number of columns of the factors."""
        return self.a.shape[-1]

    @property
    def has_dropout(self) -> bool:
        """Whether the low-rank path's input has dropout."""
        return self.keys is not None and self.origin.dropout_rate > 0

    def labels(self, *dims: int) -> frozenset:
        """Return the roles that dimensions are made of."""
        return frozenset(axes.labels([self.dims[d] for d in dims]))

    def is_rows(self) -> bool:
        """Tell whether entries were picked along an axis that is no stack."""
        return bool(self.indexed - {Role.STACK}) or Role.IN in self.windows

    def is_reduced(self) -> bool:
        """Tell whether it has lost a side, as a sum over it, and is no matrix any more."""
        has_both = {Role.IN, Role.OUT} <= self.labels(*range(len(self.dims)))
        is_as_it_was = self.origin.roles is not None and self.base.shape == self.origin.shape
        return not has_both and not is_as_it_was  # an axis of size 1 may have no label

    def is_rows_to(self, in_: frozenset, out: frozenset) -> bool:
        """Tell whether a product takes rows along an axis along which they were picked."""
        is_picked = bool(self.indexed & (in_ | out))
        return is_picked and self.is_rows() and not self._has_matrices()

    def _has_matrices(self) -> bool:
        """Tell whether each entry that was picked is a matrix, with axes of both factors."""
        if self.origin.roles is None:
            return False
        _, *sides = self.origin.roles.sizes(self.origin.shape)
        picked = (Role.IN in self.indexed, Role.OUT in self.indexed)
        counts = (sum(size != 1 for size in sizes) for sizes in sides)
        return all(count > is_picked for count, is_picked in zip(counts, picked, strict=True))

    def is_whole(self, along: Sequence[int]) -> bool:
        """Tell whether dimensions are a stack's, or repeat the weight."""
        return self.labels(*along) <= {Role.STACK, axes.REPEATED}

    def dim(self, pieces: Iterable[axes.Piece]) -> axes.Dim:
        """Return a dimension of these pieces, but not of those of size 1."""
        return tuple(piece for piece in pieces if piece[1] != 1)

    def repeated(self, times: int, dim: axes.Dim = ()) -> axes.Dim:
        """Return a dimension that repeats another, along a piece that no factor carries."""
        return self.dim([(axes.REPEATED, times)]) + dim

    def shared_label(self, labels: Iterable[axes.Label]) -> Role:
        """Return that of a stack."""
        del labels
        return Role.STACK

    def entry(self) -> Self:
        """Return the bookkeeping of an entry, as one that was picked out."""
        label = self.labels(0) - {axes.REPEATED}
        return self.replace(dims=self.dims[1:], indexed=self.indexed | label)

    def stacked(self, length: int, scanned: Sequence[Weight]) -> Self:
        """Return this with a first dimension that is a stack."""
        del scanned
        dims = (self.dim([(Role.STACK, length)]), *self.dims)
        stacked = self.replace(dims=dims)
        return stacked if length != 1 else stacked.reshaped(self.base, dims)

    def negated(self) -> Self:
        """Return this with ``b`` negated."""
        return self.replace(b=-self.b)

    def scaled_by(
        self, operation: Operation, vector: jax.Array, along: Sequence[int]
    ) -> Self | None:
        """Return this with a factor scaled that carries all of some dimensions."""
        for name in ("b", "a"):
            if self.labels(*along) <= CARRIES[name]:
                factor = getattr(self, name)
                own = self.beside(name, jnp.asarray(vector, factor.dtype), along)
                return self.replace(**{name: operation(factor, own)})
        return None

    def unrepeated(self, along: Sequence[int]) -> Self:
        """Return this with factors for each entry along dimensions in which it repeats."""
        dims = enumerate(self.dims)
        is_repeated = [d in along and label is axes.REPEATED for d, dim in dims for label, _ in dim]
        if not any(is_repeated):
            return self
        pieces = list(zip(axes.pieces(self.dims), is_repeated, strict=True))

        def repeat(factor, carries):
            kept = [
                (size, is_new) for (label, size), is_new in pieces if is_new or label in carries
            ]
            more = factor.shape[self._count(carries) :]
            factor = jnp.expand_dims(factor, [i for i, (_, is_new) in enumerate(kept) if is_new])
            return jnp.broadcast_to(factor, (*(size for size, _ in kept), *more))

        dims = tuple(
            tuple((Role.STACK, n) if label is axes.REPEATED else (label, n) for label, n in dim)
            if d in along
            else dim
            for d, dim in enumerate(self.dims)
        )
        return self._map(repeat, dims=dims)

    @property
    def scale(self) -> float:
        """Factor of the low-rank product, alpha / rank."""
        return scaling(self.origin.alpha, self.rank)

    def factors(self, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
        """Return ``a`` and ``scale * b``, scaled as they are stored and then cast."""
        return self.a.astype(dtype), scaled(self.b, self.scale, dtype)

    def input(self, x: jax.Array) -> jax.Array:
        """Return the low-rank path's input: inexact, and with dropout if the weight has it."""
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(self.base.dtype)
        if self.keys is None or not self.has_dropout:
            return x
        keep = 1 - self.origin.dropout_rate
        mask = jax.random.bernoulli(self.keys.reshape(-1)[0], keep, x.shape)
        return jnp.where(mask, x / keep, 0).astype(x.dtype)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """Return the weight as one array of the base's dtype, computed in another."""
        names, count = [], 0
        for dim in self.dims:
            names.append(list(range(count, count + len(dim))))
            count += len(dim)
        a, b = self.factors(dtype)
        a_names = [*self.piece_labels(names, "a"), RANK]
        b_names = [*self.piece_labels(names, "b"), RANK]
        pieces = axes.pieces(self.dims)
        carried = [n for n, (label, _) in enumerate(pieces) if label is not axes.REPEATED]
        product = contract(a, a_names, b, b_names, carried)
        product = placement.repeated(product, carried, [size for _, size in pieces])
        base = deferred.now(self.base)
        total = base.astype(dtype) + placement.like(product, base)
        if self.gain is not None:
            sizes = [[size for _, size in dim] for dim in self.dims]
            total = scaled_along(total, names, sizes, self.gain, self.piece_labels(names, "gain"))
        return total.astype(self.base.dtype)
