"""What is trained of a weight: the factors of a low-rank term, or new values of a leaf.

An `Adapter` holds two factors. With the axes of its weight split into *stack*, *in* and *out* axes
(`jaxlora.weights.roles`), what it adds to the weight is::

    delta[s, i, o] = scaling * sum_r a[s, i, r] * b[s, r, o]

which is LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1) for a matrix, and the same for a
kernel of any shape. A `Replacement` holds the values of a leaf that is trained itself.

Both are leaves of a dict by path, and terms of a node in a tree (`jaxlora.weights.nodes`). They
answer the same questions, so that nothing else has to know which of the two it has.
"""

import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlora.types import Json, Leaf, Leaves
from jaxlora.weights import blocks, sharding
from jaxlora.weights.blocks import Part
from jaxlora.weights.fingerprints import Fingerprint
from jaxlora.weights.opaque import Opaque
from jaxlora.weights.roles import Roles, factor_axes
from jaxlora.weights.sharding import Axes

_static = MappingProxyType({"static": True})
_ALONE = "put adapters on their base with jaxlora.bind(base, adapters)"
MakeArray = Callable[[str, tuple[int, ...], Axes], Leaf]


class Trained(Opaque):
    """What an `Adapter` and a `Replacement` have in common."""

    instead = _ALONE
    fields: ClassVar[tuple[str, ...]]  # names of the arrays that are trained
    what: ClassVar[str]  # what it is called in errors

    def trained(self) -> Leaves:
        """Return the arrays that are trained, by name."""
        found = {name: getattr(self, name) for name in self.fields}
        return {name: array for name, array in found.items() if array is not None}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter(Trained):
    """The trainable factors of one weight, or of a block of it; nothing frozen is a leaf of it.

    Attributes:
        a: factor on the input side, ``(*stack, *in, rank)``.
        b: factor on the output side, ``(*stack, rank, *out)``.
        roles: roles of the axes of the weight.
        alpha: numerator of the scaling.
        shape: shape of the whole weight that the factors were made for.
        fingerprint: what is known of that weight; nothing in a node, which holds it.
        changed: name of the initializer that took the first product out of the base, or empty.
        magnitude: the norm of each column, ``(*stack, *out)``, or None (DoRA,
            Liu et al. 2024, arXiv:2402.09353).
        block: (start, stop) along each axis of the weight that the factors are for, None for a
            whole axis; None for all of the weight.
    """

    fields = ("a", "b", "magnitude")
    what = "adapter"

    a: Leaf
    b: Leaf
    roles: Roles = dataclasses.field(metadata=_static)
    alpha: float = dataclasses.field(metadata=_static)
    shape: tuple[int, ...] = dataclasses.field(metadata=_static)
    fingerprint: Fingerprint = dataclasses.field(default_factory=Fingerprint, metadata=_static)
    changed: str = dataclasses.field(default="", metadata=_static)
    magnitude: Leaf = None
    block: Part | None = dataclasses.field(default=None, metadata=_static)

    @property
    def rank(self) -> int:
        """Number of columns of ``a``."""
        return self.a.shape[-1]

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product, alpha / rank."""
        return scaling(self.alpha, self.rank)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes that its arrays must have, by name."""
        return self._shapes(self.roles, blocks.shape(self.block, self.shape), self.rank)

    @classmethod
    def _shapes(cls, roles: Roles, block: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays for a block of some shape, by name."""
        shapes = (*roles.factor_shapes(block, rank), roles.magnitude_shape(block))
        return dict(zip(cls.fields, shapes, strict=True))

    def axes(self) -> dict[str, Axes]:
        """Return for each dimension of its arrays the axis of the weight, by name."""
        return dict(zip(self.fields, factor_axes(self.roles, self.block), strict=True))

    def delta(self, base: Leaf) -> jax.Array:
        """Return ``scaling * a b``, dense, shaped and sharded as a base, in float32 or wider."""
        roles, dtype = self.roles, merge_dtype(base.dtype)
        ndim = rank = len(base.shape)  # the name of the rank axis is the next free
        product = jnp.einsum(
            self.a.astype(dtype),
            [*roles.stack, *roles.in_, rank],
            self.b.astype(dtype),
            [*roles.stack, rank, *roles.out],
            list(range(ndim)),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=sharding.explicit(base),
        )
        return jnp.pad(product * self.scaling, blocks.padding(self.block, base.shape))

    def describe(self) -> Json:
        """Return what is static of it but the base, as JSON has it."""
        roles = {"stack": self.roles.stack, "in": self.roles.in_, "out": self.roles.out}
        return {
            "rank": int(self.rank),
            "alpha": float(self.alpha),
            "roles": {name: list(axes) for name, axes in roles.items()},
            "changed": self.changed,
        }

    @classmethod
    def from_description(
        cls, entry: Json, shape: tuple[int, ...], block: Part | None, array: MakeArray
    ) -> "Adapter":
        """Return the adapter that was described, of a weight of some shape or a block of it.

        Args:
            entry: what `describe` returned.
            shape: shape of the weight.
            block: the block of it.
            array: makes an array from its name, shape and axes of the weight, or returns None.
        """
        roles = Roles(*(tuple(entry["roles"][name]) for name in ("stack", "in", "out")))
        shapes = cls._shapes(roles, blocks.shape(block, shape), entry["rank"])
        made = map(array, cls.fields, shapes.values(), factor_axes(roles, block))
        static = {"alpha": entry["alpha"], "changed": entry["changed"], "block": block}
        return cls(**dict(zip(cls.fields, made, strict=True)), roles=roles, shape=shape, **static)

    def __repr__(self):
        return f"Adapter({self.brief()})"

    def brief(self) -> str:
        """Return the shapes of the factors and alpha, for a representation."""
        a, b = (getattr(x, "shape", x) for x in (self.a, self.b))
        return f"a={a}, b={b}, alpha={self.alpha:g}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replacement(Trained):
    """What is trained of a leaf that is trained itself, whole or by rows.

    Attributes:
        value: the leaf as it is trained, or its rows, ``(len(rows), ...)``.
        shape: shape of the whole leaf.
        fingerprint: what is known of the leaf as it was; nothing in a node, which holds it.
        rows: indices along its first axis, None for all of it.
    """

    fields = ("value",)
    what = "replacement"
    block = None  # it is for a whole leaf, or for rows of one
    rank = 0
    changed = ""

    value: Leaf
    shape: tuple[int, ...] = dataclasses.field(metadata=_static)
    fingerprint: Fingerprint = dataclasses.field(default_factory=Fingerprint, metadata=_static)
    rows: tuple[int, ...] | None = dataclasses.field(default=None, metadata=_static)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape that its array must have, by name."""
        return {"value": self.shape if self.rows is None else (len(self.rows), *self.shape[1:])}

    def axes(self) -> dict[str, Axes]:
        """Return for each dimension of its array the axis of the leaf, by name."""
        first = 0 if self.rows is None else None
        return {"value": (first, *range(1, len(self.shape)))[: len(self.shape)]}

    def describe(self) -> Json:
        """Return what is static of it but the leaf, as JSON has it."""
        return {"rows": None if self.rows is None else [int(row) for row in self.rows]}

    @classmethod
    def from_description(
        cls, entry: Json, shape: tuple[int, ...], block: Part | None, array: MakeArray
    ) -> "Replacement":
        """Return the replacement that was described, see `Adapter.from_description`."""
        del block
        rows = None if entry["rows"] is None else tuple(entry["rows"])
        empty = cls(None, shape, rows=rows)
        (value,) = (array(name, empty.shapes()[name], empty.axes()[name]) for name in cls.fields)
        return dataclasses.replace(empty, value=value)


# by path an `Adapter` or a `Replacement`; Any, as those who take them are types of trees of arrays
Adapters = dict[str, Any]
FACTORS = (*Adapter.fields, *Replacement.fields)  # the names of what is trained


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / rank, the factor of the low-rank product."""
    return alpha / rank


def merge_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype to add a low-rank product to a weight in: float32, or wider for wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
