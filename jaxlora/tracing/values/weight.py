"""A weight on its way through a program, of which there are two kinds.

A `Weight` is a weight as the program has shaped it so far: the base, shaped by the program's own
operations, and for each dimension the pieces it is made of, see `axes`. A `LowRank` has factors
beside the base, and runs with them; a `Probe` has none, and finds out how the weight is used.
What is done to the one is done to the other, so that sites and evaluation agree.
"""

import abc
import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxlora.tracing.values import axes, deferred, placement
from jaxlora.tracing.values.deferred import Base
from jaxlora.tracing.values.slicing import Change
from jaxlora.weights.roles import Roles

STATIC = MappingProxyType({"static": True})
W = TypeVar("W", bound="Weight")
T = TypeVar("T")
Operation = Callable[[jax.Array, jax.Array], jax.Array]


class NamelessWeightError(Exception):
    """A weight has to be named that has no name: no user sees it, see `Evaluation.shared`."""


class Role(enum.StrEnum):
    """What an axis is to the operation that consumes the weight."""

    STACK = "stack"
    IN = "in"
    OUT = "out"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a traced weight came from; nothing here changes on its way.

    Attributes:
        paths: path of the leaf, or of each leaf that was joined to it; none if it is nameless.
        roles: roles of its axes, None for a probe and for joined weights.
        shape: its shape.
        alpha: numerator of the scaling.
        dropout_rate: share of the low-rank path's input that is dropped.
        numbers: what tells nameless weights apart, of each that was joined.
    """

    paths: tuple[str, ...]
    roles: Roles | None = None
    shape: tuple[int, ...] = ()
    alpha: float = 1.0
    dropout_rate: float = 0.0
    numbers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Weight(abc.ABC):
    """What a low-rank weight and a probe have in common.

    Attributes:
        carries: for each array beside the base the roles whose pieces it has an axis for.
        base: the weight as the program has it here, ``axes.shape(dims)``; an array, or deferred.
        dims: the pieces of each dimension.
        origin: where it came from.
        indexed: labels of axes along which entries were picked out.
        windows: labels of axes along which parts were taken from where the program says.
        picked_at: operation and source line of the last picking.
    """

    carries: ClassVar[Mapping[str, frozenset[Role]]] = MappingProxyType({})

    base: Base
    dims: axes.Dims = dataclasses.field(metadata=STATIC)
    origin: Origin = dataclasses.field(metadata=STATIC)
    indexed: frozenset = dataclasses.field(default=frozenset(), metadata=STATIC)
    windows: frozenset = dataclasses.field(default=frozenset(), metadata=STATIC)
    picked_at: tuple[str, str] = dataclasses.field(default=("", ""), metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is here."""
        return self.base.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.size

    @property
    def picked(self) -> frozenset:
        """Labels of axes along which entries or parts were picked out."""
        return self.indexed | self.windows

    @abc.abstractmethod
    def labels(self, *dims: int) -> frozenset:
        """Return the labels that dimensions are made of."""

    @abc.abstractmethod
    def is_rows(self) -> bool:
        """Tell whether these are rows looked up in a weight, and so no weight any more."""

    @abc.abstractmethod
    def is_rows_to(self, in_: frozenset, out: frozenset) -> bool:
        """Tell whether these are rows to a product that sums some labels and keeps others."""

    @abc.abstractmethod
    def is_whole(self, along: Sequence[int]) -> bool:
        """Tell whether each entry along some dimensions is a weight, or a copy of one."""

    @abc.abstractmethod
    def dim(self, pieces: Iterable[axes.Piece]) -> axes.Dim:
        """Return a dimension of these pieces; not every kind notes those of size 1."""

    @abc.abstractmethod
    def repeated(self, times: int, dim: axes.Dim = ()) -> axes.Dim:
        """Return a dimension that repeats another, or what has none."""

    @abc.abstractmethod
    def shared_label(self, labels: Iterable[axes.Label]) -> axes.Label:
        """Return the label of an axis that stands for axes of several."""

    @abc.abstractmethod
    def entry(self) -> Self:
        """Return one entry along the first dimension, except its arrays, which are the loop's."""

    @abc.abstractmethod
    def stacked(self, length: int, scanned: Sequence["Weight"]) -> Self:
        """Return the opposite of `entry`, for arrays that a loop has stacked.

        Args:
            length: the size of the new first dimension.
            scanned: the weights that the loop runs over.
        """

    @abc.abstractmethod
    def dense(self, dtype: DTypeLike) -> jax.Array:
        """Return the weight as one array of the base's dtype, computed in another."""

    def known_stack(self) -> frozenset:
        """Return the labels of axes that are a stack for sure, where nothing else tells."""
        return frozenset()

    def scanned_over(self, labels: frozenset) -> Self:
        """Return this, having noted that a loop runs over axes of these labels."""
        del labels
        return self

    def negated(self) -> Self:
        """Return this with the low-rank part negated."""
        return self

    def scaled_by(
        self, operation: Operation, vector: jax.Array, along: Sequence[int]
    ) -> Self | None:
        """Return this with the low-rank part scaled, or None where no factor can be.

        Args:
            operation: multiplication or division.
            vector: by what, of size 1 along all but some dimensions.
            along: these.
        """
        del operation, vector, along
        return self

    def unrepeated(self, along: Sequence[int]) -> Self:
        """Return this with factors for each entry along dimensions in which it repeats."""
        del along
        return self

    def replace(self, **changes: object) -> Self:
        """Return this with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def name(self) -> str:
        """Path of the leaf, or of each that was joined.

        Raises:
            NamelessWeightError: it has none.
        """
        if not self.origin.paths:
            raise NamelessWeightError
        return " + ".join(self.origin.paths)

    def nameless(self, number: int = 0) -> Self:
        """Return this without what tells it from others of its shapes, which are traced as one.

        Args:
            number: tells it from other weights that are traced with it.
        """
        origin = dataclasses.replace(self.origin, paths=(), numbers=(number,))
        return self.replace(origin=origin, picked_at=("", ""))

    def reshaped(self, base: Base, dims: axes.Dims) -> Self:
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

    def transposed(self, base: Base | jax.ShapeDtypeStruct, permutation: Sequence[int]) -> Self:
        """Return this with its dimensions in another order."""

        def transpose(factor, carries):
            order = axes.order(self.dims, permutation, carries.__contains__)
            return factor.transpose(*order, *range(len(order), factor.ndim))

        return self._map(transpose, base=base, dims=tuple(self.dims[d] for d in permutation))

    def along(
        self, dim: int, apply: Change, *operands: jax.Array, base: Base | None = None
    ) -> Self:
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
        new = self.dim([(label, base.shape[dim])])

        def change(factor, carries):
            if label not in carries:
                return factor
            axis = sum(piece[0] in carries for piece in axes.pieces(self.dims[:dim]))
            factor = apply(factor, axis, *operands)
            return factor if new else factor.squeeze(axis)

        return self._map(change, base=base, dims=(*self.dims[:dim], new, *self.dims[dim + 1 :]))

    def arrays(self) -> dict[str, jax.Array]:
        """Return the arrays beside the base, by name, those that there are."""
        parts = {name: getattr(self, name) for name in self.carries}
        return {name: part for name, part in parts.items() if part is not None}

    def beside(self, factor: str, vector: jax.Array, along: Sequence[int]) -> jax.Array:
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

    def piece_labels(self, dims: Sequence[Sequence[T]], factor: str) -> list[T]:
        """Return the names, given for each piece of each dimension, that a factor carries."""
        named = zip(axes.pieces(self.dims), (name for dim in dims for name in dim), strict=True)
        return [name for (label, _), name in named if label in self.carries[factor]]

    def _count(self, carries: frozenset[Role]) -> int:
        return sum(label in carries for label, _ in axes.pieces(self.dims))

    def _map(
        self, change: Callable[[jax.Array, frozenset[Role]], jax.Array], **fields: object
    ) -> Self:
        """Return this with ``change(array, carries)`` for each array, and fields replaced."""
        for name, array in self.arrays().items():
            fields[name] = change(array, self.carries[name])
        return self.replace(**fields)


def base_of(value: Weight | Base) -> Base:
    """Return the base of a weight, and any other value as it is."""
    return value.base if isinstance(value, Weight) else value
