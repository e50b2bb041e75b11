"""An array that is not made until the program reads it, as that of a quantized weight.

What the program does to it on its way is done to what it will be made of, where that is possible
(an entry of a stack, rows of a table), or kept to be done when it is made. The operation that
reads it makes it for itself alone: in a derivative it is made again and not kept.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Eqn
from jaxlora.tracing.values.slicing import Change
from jaxlora.tracing.values.tangents import moves
from jaxlora.types import PyTree
from jaxlora.weights.quantized import QuantizedWeight, dequantized

_meta = MappingProxyType({"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array to be made.

    It is *aligned* where each array it is made of has an axis for each of its own, of the same size
    or, for some, smaller; what is done along another axis can be done to them.

    Attributes:
        parts: a tree of the arrays it is made of; if it is aligned, of their shape.
        make: a function of them that returns an array.
        order: for each dimension its axis in that array.
        dtypes: what it is converted to, one after the other.
        made: shape and dtype of that array, or None if this is aligned.
        is_cut: whether something was done to what it is made of.
    """

    parts: PyTree
    make: Callable[[PyTree], jax.Array] = dataclasses.field(metadata=_meta)
    order: tuple[int, ...] = dataclasses.field(metadata=_meta)
    dtypes: tuple[np.dtype, ...] = dataclasses.field(metadata=_meta)
    made: jax.ShapeDtypeStruct | None = dataclasses.field(default=None, metadata=_meta)
    is_cut: bool = dataclasses.field(default=False, metadata=_meta)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight) -> "Deferred":
        """Return the array of a quantized weight; it gets no gradient."""
        parts = jax.tree.map(lax.stop_gradient, weight)
        return cls(parts, dequantized, tuple(range(weight.ndim)), (jnp.dtype(weight.dtype),))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        known = self.parts if self.made is None else self.made
        return tuple(known.shape[axis] for axis in self.order)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array."""
        return self.dtypes[-1]

    @property
    def ndim(self) -> int:
        """Number of its dimensions."""
        return len(self.order)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size

    def astype(self, dtype: DTypeLike) -> "Deferred":
        """Return this converted to another dtype."""
        return dataclasses.replace(self, dtypes=(*self.dtypes, jnp.dtype(dtype)))

    @property
    def is_aligned(self) -> bool:
        """Whether each array it is made of has its axes."""
        return self.made is None

    def entry(self) -> "Deferred":
        """Return one entry along the first dimension; its arrays are the loop's."""
        return dataclasses.replace(self, order=tuple(axis - 1 for axis in self.order[1:]))

    def stacked(self) -> "Deferred":
        """Return the opposite of `entry`."""
        return dataclasses.replace(self, order=(0, *(axis + 1 for axis in self.order)))

    def has_whole(self, dim: int) -> bool:
        """Tell whether all it is made of has a dimension in full, so that it can be cut there."""
        axis = self.order[dim]
        return self.is_aligned and len({x.shape[axis] for x in jax.tree.leaves(self.parts)}) == 1

    def is_scannable(self) -> bool:
        """Tell whether its first dimension is the first axis of all it is made of."""
        return self.order[0] == 0 and self.has_whole(0)

    def on_parts(
        self, change: Callable[[jax.Array], jax.Array], order: tuple[int, ...]
    ) -> "Deferred":
        """Return this made of other arrays, aligned as before, its dimensions in another order."""
        parts = jax.tree.map(change, self.parts)
        return dataclasses.replace(self, parts=parts, order=order, is_cut=True)


Base = jax.Array | Deferred


def now(x: Base) -> jax.Array:
    """Return the array, made if it is deferred."""
    if not isinstance(x, Deferred):
        return x
    array = x.make(x.parts)
    if x.order != tuple(range(x.ndim)):
        array = array.transpose(x.order)
    for dtype in x.dtypes:
        array = array.astype(dtype)
    return array


def leave(x: Base) -> jax.Array | QuantizedWeight:
    """Return what leaves a program: the weight, quantized if nothing was done to it."""
    if isinstance(x, Deferred) and x.is_aligned and not x.is_cut:
        is_same = x.order == tuple(range(x.ndim)) and len(x.dtypes) == 1
        return x.parts if is_same else now(x)
    return now(x)


def abstract(x: Base) -> jax.Array | jax.ShapeDtypeStruct:
    """Return the shape and dtype of what is deferred; anything else as it is."""
    return jax.eval_shape(now, x) if isinstance(x, Deferred) else x


def lazily(function: Callable[..., jax.Array], *values: Base) -> Base:
    """Return ``function(*values)``, deferred if one of the values is."""
    if not any(isinstance(value, Deferred) for value in values):
        return function(*values)
    made = jax.eval_shape(function, *map(abstract, values))
    return Deferred(
        values,
        lambda values: function(*map(now, values)),
        tuple(range(made.ndim)),
        (made.dtype,),
        made,
    )


def read(
    eqn: Eqn, values: Sequence[Base], product: Callable[..., jax.Array]
) -> Sequence[jax.Array]:
    """Run an equation, with what is deferred made for it and for its derivative.

    Args:
        eqn: the equation.
        values: its inputs.
        product: runs a function of an input and of what is deferred, as `product` does.
    """
    arrays = [value for value in values if not isinstance(value, Deferred)]
    if registry.primitive(eqn).is_product and len(arrays) == len(values) - 1:
        for side, value in enumerate(values[:2]):
            if isinstance(value, Deferred):

                def function(x, w, *others, side=side):
                    return compat.bind(eqn, [w, x, *others] if side == 0 else [x, w, *others])[0]

                return [product(function, arrays[0], value, *arrays[1:])]
    return jax.checkpoint(lambda *values: compat.bind(eqn, [*map(now, values)]))(*values)


def product(
    function: Callable[..., jax.Array],
    x: jax.Array,
    w: Deferred,
    *others: jax.Array,
    after: jax.Array | None = None,
) -> jax.Array:
    """Return ``function(x, w, *others)``, linear in x, with a deferred w made for it.

    It is made when x and what it comes after are there, and made again in a derivative: so of
    several that are read one after the other, one is there at a time.
    """

    def made(x, w, others):
        return function(x, now(w), *others)

    @jax.custom_jvp
    def ordered(x, w, others, after):
        x, w, _ = lax.optimization_barrier((x, w, after))
        return made(x, w, others)

    def jvp(primals, tangents):
        values, treedef = jax.tree.flatten(primals[:3])
        dots = enumerate(jax.tree.leaves(tangents[:3]))
        moving = {i: dot for i, dot in dots if moves(dot)}

        @jax.checkpoint
        def moved(moving):
            own = [moving.get(i, value) for i, value in enumerate(values)]
            return made(*treedef.unflatten(own))

        if {*moving} == {0}:  # x alone, of which it is a linear function
            return ordered(*primals), moved(moving)
        return ordered(*primals), jax.jvp(moved, [{i: values[i] for i in moving}], [moving])[1]

    ordered.defjvp(jvp, symbolic_zeros=True)
    return ordered(x, w, others, jax.tree.map(lax.stop_gradient, after))


def along(x: Base, dim: int, change: Change, *operands: jax.Array) -> Base:
    """Return ``change(x, dim, *operands)``, an operation on one dimension."""
    if isinstance(x, Deferred) and x.has_whole(dim):
        return x.on_parts(lambda part: change(part, x.order[dim], *operands), x.order)
    return lazily(lambda array, *operands: change(array, dim, *operands), x, *operands)


def bind(eqn: Eqn, values: Sequence[Base]) -> Base:
    """Return the output of an operation that rearranges or converts, deferred if one value is."""
    does = registry.primitive(eqn).deferred
    if does is not None and isinstance(values[0], Deferred):
        found = does(eqn, *values)
        if found is not None:
            return found
    return lazily(lambda *values: compat.bind(eqn, values)[0], *values)


def later(eqn: Eqn, *values: Base) -> None:
    """Do an operation when the array is made, see `registry.Primitive.deferred`."""
