"""The value that flows through a program in the place of an adapted weight.

A `LowRank` is a weight as the program has shaped it so far: the base, shaped by the program's
own operations, the factors, shaped along, and for each dimension the pieces it is made of. Each
factor has one axis for each piece of a role that it carries, in the order of the pieces, and
``a`` and ``b`` have the rank as their last axis. So an operation on one dimension of the weight
is an operation on one axis of the factors that carry it.

Without factors it is a *probe*, whose labels are sets of original axes, each a path and an axis
number: an evaluation of the same program with probes finds the sites.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.tracing.values import axes, deferred, placement
from jaxlora.tracing.values.chain import contract, scaled, scaled_along
from jaxlora.weights.adapters import scaling
from jaxlora.weights.roles import Roles

_meta = {"static": True}


class Role(enum.StrEnum):
    """What an axis is to the operation that consumes the weight."""

    STACK = "stack"
    IN = "in"
    OUT = "out"


CARRIES = {
    "a": frozenset({Role.STACK, Role.IN}),
    "b": frozenset({Role.STACK, Role.OUT}),
    "keys": frozenset({Role.STACK}),
    "gain": frozenset({Role.STACK, Role.OUT}),
}
RANK = -1


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a traced weight came from; nothing here changes on its way.

    Attributes:
        paths: path of the leaf, or of each leaf that was joined to it.
        roles: roles of its axes, None for a probe and for joined weights.
        shape: its shape.
        alpha: numerator of the scaling.
        dropout_rate: share of the low-rank path's input that is dropped.
    """

    paths: tuple[str, ...]
    roles: Roles | None = None
    shape: tuple[int, ...] = ()
    alpha: float = 1.0
    dropout_rate: float = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """An adapted weight on its way through a program, or a probe in its place.

    Attributes:
        base: the weight as the program has it here, ``axes.shape(dims)``; an array, or deferred.
        a: ``(*stack and in pieces, rank)``, None in a probe.
        b: ``(*stack and out pieces, rank)``, None in a probe.
        keys: dropout keys, ``(*stack pieces,)``, or None.
        dims: the pieces of each dimension.
        origin: where it came from.
        indexed: labels of axes along which entries were picked out.
        windows: labels of axes along which parts were taken from where the program says.
        scanned: labels of axes that a loop runs over, or a constant index picks from, which are
            a stack for sure; only a probe needs to know.
        picked_at: operation and source line of the last picking.
        gain: what scales the columns of the base and the product, ``(*stack and out pieces,)``, or
            None.
    """

    base: Any
    a: Any
    b: Any
    keys: Any
    dims: axes.Dims = dataclasses.field(metadata=_meta)
    origin: Origin = dataclasses.field(metadata=_meta)
    indexed: frozenset = dataclasses.field(default=frozenset(), metadata=_meta)
    windows: frozenset = dataclasses.field(default=frozenset(), metadata=_meta)
    scanned: frozenset = dataclasses.field(default=frozenset(), metadata=_meta)
    picked_at: tuple[str, str] = dataclasses.field(default=("", ""), metadata=_meta)
    gain: Any = None

    @property
    def is_probe(self) -> bool:
        """Whether this only looks for sites."""
        return self.a is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is here."""
        return self.base.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.size

    @property
    def rank(self) -> int:
        """Number of columns of the factors."""
        return self.a.shape[-1]

    @property
    def has_dropout(self) -> bool:
        """Whether the low-rank path's input has dropout."""
        return self.keys is not None and self.origin.dropout_rate > 0

    def labels(self, *dims: int) -> frozenset:
        """Return the roles that dimensions are made of; in a probe, the original axes."""
        found = axes.labels([self.dims[d] for d in dims])
        return frozenset().union(*found) if self.is_probe else frozenset(found)

    def is_rows(self) -> bool:
        """Whether these are rows looked up in a weight, and so no weight any more."""
        if self.is_probe:
            rest = self.labels(*range(len(self.dims))) - self.picked
            return bool(self.picked) and (bool(rest) or len(self.indexed) > 1)
        return bool(self.indexed - {Role.STACK}) or Role.IN in self.windows

    def has_matrices(self) -> bool:
        """Whether each entry that was picked of this is a matrix, with axes of both factors."""
        if self.origin.roles is None:
            return False
        _, *sides = self.origin.roles.sizes(self.origin.shape)
        picked = (Role.IN in self.indexed, Role.OUT in self.indexed)
        counts = (sum(size != 1 for size in sizes) for sizes in sides)
        return all(count > is_picked for count, is_picked in zip(counts, picked, strict=True))

    @property
    def picked(self) -> frozenset:
        """Labels of axes along which entries or parts were picked out."""
        return self.indexed | self.windows

    def reshaped(self, base: Any, dims: axes.Dims) -> "LowRank":
        """Return this with the same pieces in the same order, split and joined as in dims."""

        def shape(factor, carries):
            sizes = [size for label, size in axes.pieces(dims) if label in carries]
            sizes += factor.shape[self._count(carries) :]
            if (sharding := placement.explicit(factor)) is None or sizes == [*factor.shape]:
                return factor.reshape(sizes)
            spec = placement.spec_of(dims, placement.typed(base), carries.__contains__)
            spec = PartitionSpec(*(spec or [None] * len(sizes))[: len(sizes)])
            return jax.lax.reshape(factor, sizes, out_sharding=NamedSharding(sharding.mesh, spec))

        return self._map(shape, base=base, dims=dims)

    def entry(self) -> "LowRank":
        """Return the books of one entry along the first dimension; its arrays are the loop's."""
        label = self.labels(0) - {axes.REPEATED}
        fields: dict[str, Any] = {"scanned": self.scanned | label} if self.is_probe else {}
        return self.replace(dims=self.dims[1:], **fields or {"indexed": self.indexed | label})

    def unrepeated(self, along: Sequence[int]) -> "LowRank":
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

    def transposed(self, base: Any, permutation: Sequence[int]) -> "LowRank":
        """Return this with its dimensions in another order."""

        def transpose(factor, carries):
            order = axes.order(self.dims, permutation, carries.__contains__)
            return factor.transpose(*order, *range(len(order), factor.ndim))

        return self._map(transpose, base=base, dims=tuple(self.dims[d] for d in permutation))

    def along(
        self, dim: int, apply: Callable[..., Any], *operands: Any, base: Any = None
    ) -> "LowRank":
        """Return this with ``apply(array, axis, *operands)`` done to the one piece of a dimension.

        Args:
            dim: a dimension of one piece.
            apply: the operation on one axis of an array.
            *operands: arrays that it takes.
            base: the new base, where something else was done to it.

        Returns:
            The weight with the base and each factor that carries the piece changed.
        """
        ((label, _),) = self.dims[dim]
        base = deferred.along(self.base, dim, apply, *operands) if base is None else base
        size = base.shape[dim]
        new = ((label, size),) if size != 1 or self.is_probe else ()

        def change(factor, carries):
            if label not in carries:
                return factor
            axis = sum(piece[0] in carries for piece in axes.pieces(self.dims[:dim]))
            factor = apply(factor, axis, *operands)
            return factor if new else factor.squeeze(axis)

        return self._map(change, base=base, dims=(*self.dims[:dim], new, *self.dims[dim + 1 :]))

    def replace(self, **changes: Any) -> "LowRank":
        """Return this with some fields changed."""
        return dataclasses.replace(self, **changes)

    def beside(self, factor: str, vector: Any, along: Sequence[int]) -> Any:
        """Return an array that varies along some dimensions in a shape that meets a factor.

        Args:
            factor: name of a factor, which carries the pieces of these dimensions.
            vector: the array, of size 1 along the other dimensions.
            along: the dimensions.
        """
        sizes = [[size if d in along else 1 for _, size in dim] for d, dim in enumerate(self.dims)]
        shape = self.piece_labels(sizes, factor)
        more = getattr(self, factor).ndim - len(shape)  # the rank
        return vector.reshape([*shape, *[1] * more])

    def piece_labels(self, dims: Sequence[Sequence[Any]], factor: str) -> list[Any]:
        """Return the names, given for each piece of each dimension, that a factor carries."""
        named = zip(axes.pieces(self.dims), (name for dim in dims for name in dim), strict=True)
        return [name for (label, _), name in named if label in CARRIES[factor]]

    @property
    def scale(self) -> float:
        """Factor of the low-rank product, alpha / rank."""
        return scaling(self.origin.alpha, self.rank)

    def factors(self, dtype: Any) -> tuple[Any, Any]:
        """Return ``a`` and ``scale * b``, scaled as they are stored and then cast."""
        return self.a.astype(dtype), scaled(self.b, self.scale, dtype)

    def input(self, x: Any) -> Any:
        """Return the low-rank path's input: inexact, and with dropout if the weight has it."""
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(self.base.dtype)
        if not self.has_dropout:
            return x
        keep = 1 - self.origin.dropout_rate
        mask = jax.random.bernoulli(self.keys.reshape(-1)[0], keep, x.shape)
        return jnp.where(mask, x / keep, 0).astype(x.dtype)

    def dense(self, dtype: Any) -> Any:
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

    def _count(self, carries: frozenset) -> int:
        return sum(label in carries for label, _ in axes.pieces(self.dims))

    def _map(self, change: Callable[[Any, frozenset], Any], **fields: Any) -> "LowRank":
        """Return this with ``change(factor, carries)`` for each factor, and fields replaced."""
        for name, carries in CARRIES.items():
            if (factor := getattr(self, name)) is not None:
                fields[name] = change(factor, carries)
        return self.replace(**fields)
