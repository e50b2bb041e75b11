"""The low-rank term of a product with a weight: a name for each piece of each axis.

The axes of the input, the factors and the result are cut into the pieces of the weight's axes, so
that the term is two products of arrays with named axes, whatever the program did to the weight.
"""

import dataclasses
import enum
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.options import Options
from jaxlora.tracing.types import Eqn
from jaxlora.tracing.values import axes, placement
from jaxlora.tracing.values.chain import How, Name, chain, narrow
from jaxlora.tracing.values.lowrank import RANK, LowRank
from jaxlora.tracing.values.scaling import scaled_along

Names = list[list[Name]]  # of the pieces of each dimension
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sides:
    """The dimensions of the two operands of a `dot_general`, by what becomes of them.

    Attributes:
        weight: dimensions of the weight that are summed, that only it has, and in the batch.
        x: the same of the other operand.
    """

    weight: tuple[Sequence[int], Sequence[int], Sequence[int]]
    x: tuple[Sequence[int], Sequence[int], Sequence[int]]

    @classmethod
    def from_equation(cls, eqn: Eqn, side: int) -> "Sides":
        """Return the dimensions where the weight is the operand of this position."""
        summed, batch = eqn.params["dimension_numbers"]
        groups = []
        for at in (side, 1 - side):
            taken = (*summed[at], *batch[at])
            free = [d for d in range(len(compat.shape(eqn.invars[at]))) if d not in taken]
            groups.append((summed[at], free, batch[at]))
        return cls(*groups)


class Scaled(enum.Enum):
    """What a gain scales in a product with its weight."""

    INPUT = enum.auto()
    RESULT = enum.auto()
    WEIGHT = enum.auto()


@dataclasses.dataclass(frozen=True)
class Gain:
    """How the gain of a weight meets a product with it.

    Attributes:
        scaled: the result of the product where it keeps the columns, the input where it sums over
            them, and the weight itself where it does neither.
        names: of the gain.
        dims: names of what each dimension of what is scaled is made of.
        sizes: their sizes.
    """

    scaled: Scaled
    names: Sequence[Name]
    dims: Sequence[Sequence[Name]] = ()
    sizes: Sequence[Sequence[int]] = ()

    def scale(self, x: jax.Array, gain: jax.Array) -> jax.Array:
        """Return the input or the result of the product times a gain."""
        return scaled_along(x, self.dims, self.sizes, gain, self.names)

    @property
    def is_of_last(self) -> bool:
        """Whether it scales the last dimension of the result, all of it and no other."""
        return self.scaled is Scaled.RESULT and {*self.names} == {*self.dims[-1]}

    def of_last(self, gain: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Return a gain of the last dimension in a shape that this is split into."""
        return gain.transpose([self.names.index(name) for name in self.dims[-1]]).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Term:
    """How the input of one product meets the factors of its weight.

    Attributes:
        order: the factors by name, the one that shares more with the input first.
        tokens: rows of the input for each entry of the weight's stack.
        x_sizes: the pieces of each dimension of the input.
        repeated: the pieces of the input along which the weight repeats.
        names: of the input, the first factor, the rank-sized product, the second factor and the
            result, each but the pieces along which nothing changes.
        out_sizes: the pieces of the result.
        out_kept: those that have names.
        precision: of the products, as in `jax.lax.dot_general`.
        dtype: dtype of the products.
        gain: how the gain of the weight meets the product, None where it has none.
    """

    order: tuple[str, str]
    tokens: int
    x_sizes: tuple[tuple[int, ...], ...]
    repeated: tuple[int, ...]
    names: tuple[tuple[Name, ...], ...]
    out_sizes: tuple[int, ...]
    out_kept: tuple[int, ...]
    precision: lax.PrecisionLike
    dtype: DTypeLike
    gain: Gain | None = None

    @classmethod
    def from_equation(cls, eqn: Eqn, side: int, weight: LowRank, x: jax.Array) -> "Term":
        """Return the term of a product whose operand of this position is the weight."""
        sides = Sides.from_equation(eqn, side)
        w_names, x_names, x_sizes = _names(sides, weight, x)
        free = [[w_names[d] for d in sides.weight[1]], [x_names[d] for d in sides.x[1]]]
        batch = [w_names[d] for d in sides.weight[2]]
        out_dims = [dim for group in (batch, *(free if side == 0 else free[::-1])) for dim in group]
        out = _flat(out_dims)
        names = _flat(x_names)
        sizes = dict(zip(_flat(w_names), [n for _, n in axes.pieces(weight.dims)], strict=True))
        sizes |= zip(names, _flat(x_sizes), strict=True)

        carried = {f: [*weight.piece_labels(w_names, f), RANK] for f in ("a", "b")}
        shares = {f: math.prod(sizes[n] for n in carried[f] if n in names) for f in carried}
        order = ("b", "a") if shares["b"] > shares["a"] else ("a", "b")
        first, second = (carried[f] for f in order)
        known = {*first, *second, *out}
        kept = [i for i, n in enumerate(out) if n in {*names, *first, *second}]
        x_kept = [n for n in names if n in known]
        h = [n for n in dict.fromkeys((*x_kept, *first)) if n in {*second, *out}]
        taken = math.prod(weight.shape[d] for group in sides.weight[1:] for d in group)
        return cls(
            order,
            compat.size(eqn.outvars[0]) // taken,
            tuple(map(tuple, x_sizes)),
            tuple(i for i, n in enumerate(names) if n not in known),
            tuple(map(tuple, (x_kept, first, h, second, [out[i] for i in kept]))),
            tuple(sizes[n] for n in out),
            tuple(kept),
            eqn.params["precision"],
            eqn.params["preferred_element_type"],
            _gain(weight, w_names, (x_names, x_sizes), out_dims, sizes),
        )

    def start(self, weight: LowRank) -> Hashable:
        """Return what is equal in terms whose rank-sized products can be made as one."""
        first = getattr(weight, self.order[0])
        how = (self.precision, self.dtype, weight.base.dtype, weight.has_dropout)
        where = (first.shape[:-1], placement.explicit(first), self.scales_input)
        return self.order, self.x_sizes, self.names[:3], how, where

    @property
    def scales_input(self) -> bool:
        """Whether the input is scaled for this weight, so that no other product has the same."""
        return self.gain is not None and self.gain.scaled is Scaled.INPUT

    def narrow(
        self, options: Options, x: jax.Array, weights: Sequence[LowRank]
    ) -> Sequence[jax.Array]:
        """Return the products of the input with the first factor of each weight, made as one."""
        return narrow(
            self._input(weights[0], x),
            [getattr(weight, self.order[0]) for weight in weights],
            names=self.names[:3],
            scales=tuple(self._scales(weight)[0] for weight in weights),
            how=self._how(options, weights[0], x, is_shared=True),
        )

    def __call__(
        self,
        options: Options,
        x: jax.Array,
        weight: LowRank,
        h: jax.Array | None = None,
        moving: str = "",
        to: jax.Array | None = None,
    ) -> jax.Array:
        """Return the term, or the sum with it.

        Args:
            options: how the program is evaluated.
            x: the input.
            weight: the weight.
            h: the product of the input and the first factor, where it is known.
            moving: ``"a"``, ``"b"`` or ``"x"`` where that is a tangent.
            to: what the term is added to: the product, also where its last dimension is split.
        """
        first, second = (getattr(weight, factor) for factor in self.order)
        return chain(
            to,
            self._input(weight, x) if h is None else h,
            first if h is None else None,
            second,
            names=self.names,
            scales=self._scales(weight),
            how=self._how(options, weight, x, moving, is_shared=h is not None),
            out=(self.out_kept, self.out_sizes),
        )

    def _input(self, weight: LowRank, x: jax.Array) -> jax.Array:
        x = placement.reshape(weight.input(x), self.x_sizes)
        return x.sum(self.repeated) if self.repeated else x

    def _scales(self, weight: LowRank) -> tuple[float, float]:
        """Return what the factors are scaled by: ``b`` takes it, for which no scaling is too large.

        It starts at zero, and ``a`` scaled would overflow float16 before it has learned anything.
        """
        return (weight.scale, 1.0) if self.order == ("b", "a") else (1.0, weight.scale)

    def _how(
        self, options: Options, weight: LowRank, x: jax.Array, moving: str = "", *, is_shared: bool
    ) -> How:
        tangent = self.order.index(moving) if moving in self.order else None
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        is_kept = not options.is_linear and moving in ("", self.order[1])
        is_named = is_kept and not is_complex  # JAX 0.10 cannot keep complex arrays by name
        factor_dtype = x.dtype if is_complex else weight.base.dtype
        again = options.is_rematerialized and not is_shared
        return How(self.precision, self.dtype, factor_dtype, is_named, again, tangent)


def _names(sides: Sides, weight: LowRank, x: jax.Array) -> tuple[Names, Names, list[list[int]]]:
    """Return names for the pieces of the weight and of x, and the sizes of those of x.

    Dimensions that meet in the product have the same pieces, and their names are those of x, so
    that weights of other dimensions have the same names there.
    """
    of_weight: Names = [[("w", d, i) for i in range(len(dim))] for d, dim in enumerate(weight.dims)]
    of_x: Names = [[("x", d, 0)] for d in range(x.ndim)]
    x_sizes = [[size] for size in x.shape]
    for group in (0, 2):
        for d, dim in zip(sides.x[group], sides.weight[group], strict=True):
            x_sizes[d] = [size for _, size in weight.dims[dim]]
            of_x[d] = of_weight[dim] = [("x", d, i) for i in range(len(x_sizes[d]))]
    return of_weight, of_x, x_sizes


def _gain(
    weight: LowRank,
    w_names: Names,
    x_dims: tuple[Names, list[list[int]]],
    out_dims: Names,
    sizes: dict[Name, int],
) -> Gain | None:
    """Return how the gain of a weight meets a product."""
    if weight.gain is None:
        return None
    names = weight.piece_labels(w_names, "gain")
    if {*names} <= {*_flat(out_dims)}:
        return Gain(Scaled.RESULT, names, out_dims, [[sizes[n] for n in dim] for dim in out_dims])
    if {*names} <= {*_flat(x_dims[0])}:
        return Gain(Scaled.INPUT, names, *x_dims)
    return Gain(Scaled.WEIGHT, names)


def _flat(groups: Iterable[Iterable[T]]) -> list[T]:
    return [item for group in groups for item in group]
