"""The node that stands for an adapted weight, and what can be said of it without a program.

An adapted weight is its frozen ``base`` and two factors. With the axes of the base parted
into *stack*, *in* and *out* axes (`Roles`), the weight in effect is::

    W[s, i, o] = base[s, i, o] + scaling * sum_r a[s, i, r] * b[s, r, o]

which is LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1) for a matrix, and the same for a
kernel of any shape. Which axes have which role is read off the program (`jaxlora.find_sites`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.weights import blocks, quantized, sharding
from jaxlora.weights.fingerprints import Fingerprint
from jaxlora.weights.opaque import Opaque
from jaxlora.weights.roles import Roles

_meta = {"static": True}
FACTORS = ("a", "b", "magnitude", "value")  # what is trained of a node

_NODE = "call the function as jaxlora.lora(fn), or fold the adapters in with jaxlora.merge(params)"

_ALONE = "put adapters on their base with jaxlora.bind(base, adapters)"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter(Opaque):
    """The trainable factors of one weight; nothing frozen is a leaf of it.

    Attributes:
        a: factor on the input side, ``(*stack, *in, rank)``.
        b: factor on the output side, ``(*stack, rank, *out)``.
        roles: roles of the axes of the weight.
        alpha: numerator of the scaling.
        shape: shape of the whole weight that the factors were made for.
        fingerprint: what is known of that weight.
        changed: name of the initializer that took the first product out of the base, or empty.
        magnitude: the norm of each column, ``(*stack, *out)``, or None (DoRA,
            Liu et al. 2024, arXiv:2402.09353).
    """

    instead = _ALONE

    a: Any
    b: Any
    roles: Roles = dataclasses.field(metadata=_meta)
    alpha: float = dataclasses.field(metadata=_meta)
    shape: tuple[int, ...] = dataclasses.field(metadata=_meta)
    fingerprint: Fingerprint = dataclasses.field(default_factory=Fingerprint, metadata=_meta)
    changed: str = dataclasses.field(default="", metadata=_meta)
    magnitude: Any = None

    @property
    def rank(self) -> int:
        """Number of columns of ``a``."""
        return self.a.shape[-1]

    def over(self, base: Any, part: blocks.Part | None) -> "LoRAWeight":
        """Return the node of these factors over a weight or a node, for a part of it or all."""
        fields: dict[str, Any] = {"changed": self.changed, "magnitude": self.magnitude}
        return LoRAWeight(base, self.a, self.b, self.roles, self.alpha, part, **fields)

    def __repr__(self):
        a, b = (getattr(x, "shape", x) for x in (self.a, self.b))
        return f"Adapter(a={a}, b={b}, alpha={self.alpha:g})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight(Opaque):
    """An adapted weight, in the place of the leaf it adapts.

    It is a pytree node; `jaxlora.lora` makes functions accept it where they take an array. Where
    several parts of a weight are adapted, the node of one is the base of the next.

    Attributes:
        base: the frozen weight, of any shape and floating dtype or quantized, or a node.
        a: factor on the input side, ``(*stack, *in, rank)``.
        b: factor on the output side, ``(*stack, rank, *out)``.
        roles: roles of the axes of ``base``.
        alpha: numerator of the scaling.
        part: the block of the weight that the factors are for, None for all of it.
        dropout_keys: None, or one random key for each stack entry, ``(*stack,)``.
        dropout_rate: share of the low-rank path's input that is dropped.
        changed: name of the initializer that took the first product out of the base, or empty.
        magnitude: the norm of each column, ``(*stack, *out)``, or None (DoRA,
            Liu et al. 2024, arXiv:2402.09353).
    """

    instead = _NODE

    base: Any
    a: Any
    b: Any
    roles: Roles = dataclasses.field(metadata=_meta)
    alpha: float = dataclasses.field(metadata=_meta)
    part: blocks.Part | None = dataclasses.field(default=None, metadata=_meta)
    dropout_keys: Any = None
    dropout_rate: float = dataclasses.field(default=0.0, metadata=_meta)
    changed: str = dataclasses.field(default="", metadata=_meta)
    magnitude: Any = None

    @property
    def layers(self) -> list["LoRAWeight"]:
        """The nodes of this weight, the innermost first."""
        inner = self.base.layers if isinstance(self.base, LoRAWeight) else []
        return [*inner, self]

    @property
    def plain(self) -> Any:
        """The frozen weight, beneath every node."""
        return self.layers[0].base

    @property
    def has_magnitude(self) -> bool:
        """Whether a node of this weight has a magnitude."""
        return any(node.magnitude is not None for node in self.layers)

    def adapter(self, fingerprint: Fingerprint) -> Adapter:
        """Return what is trained of this node, for a base of this fingerprint."""
        about = (self.roles, self.alpha, tuple(self.shape), fingerprint, self.changed)
        return Adapter(self.a, self.b, *about, self.magnitude)

    def over(self, plain: Any) -> "LoRAWeight":
        """Return the same nodes over another frozen weight."""
        below = self.base.over(plain) if isinstance(self.base, LoRAWeight) else plain
        return dataclasses.replace(self, base=below)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    @property
    def dtype(self):
        """Dtype of the weight."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """Number of columns of ``a``."""
        return self.a.shape[-1]

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product, alpha / rank."""
        return scaling(self.alpha, self.rank)

    def delta(self) -> jax.Array:
        """Return ``scaling * a b``, dense, shaped and sharded as the base, in float32 or wider."""
        if isinstance(self.base, LoRAWeight):
            return self.base.delta() + self._own_delta()
        return self._own_delta()

    def _own_delta(self) -> jax.Array:
        roles, dtype = self.roles, merge_dtype(self.dtype)
        ndim = rank = len(self.shape)  # the name of the rank axis is the next free
        product = jnp.einsum(
            self.a.astype(dtype),
            [*roles.stack, *roles.in_, rank],
            self.b.astype(dtype),
            [*roles.stack, rank, *roles.out],
            list(range(ndim)),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=sharding.explicit(self.plain),
        )
        return jnp.pad(product * self.scaling, blocks.padding(self.part, self.shape))

    def __repr__(self):
        base, a, b = (getattr(x, "shape", x) for x in (self.plain, self.a, self.b))
        part = blocks.name("", self.part)
        return f"LoRAWeight(base={base}{part}, a={a}, b={b}, alpha={self.alpha:g})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replacement(Opaque):
    """What is trained of a leaf that is trained whole or by rows, among adapters.

    Attributes:
        value: the leaf as it is trained, or its rows, ``(len(rows), ...)``.
        shape: shape of the whole leaf.
        fingerprint: what is known of the leaf as it was.
        rows: indices along its first axis, None for all of it.
    """

    instead = _ALONE

    value: Any
    shape: tuple[int, ...] = dataclasses.field(metadata=_meta)
    fingerprint: Fingerprint = dataclasses.field(default_factory=Fingerprint, metadata=_meta)
    rows: tuple[int, ...] | None = dataclasses.field(default=None, metadata=_meta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedLeaf(Opaque):
    """A leaf that is trained whole or by rows, in its place; `jaxlora.lora` passes what it is now.

    Attributes:
        base: the leaf as it was.
        value: the leaf as it is trained, or its rows, ``(len(rows), ...)``.
        rows: indices along its first axis, None for all of it.
    """

    instead = _NODE

    base: Any
    value: Any
    rows: tuple[int, ...] | None = dataclasses.field(default=None, metadata=_meta)

    @property
    def now(self) -> jax.Array:
        """The leaf as it is trained; by rows, with a copy of the others, which get no gradient."""
        if self.rows is None:
            return self.value
        base = jnp.asarray(jax.lax.stop_gradient(quantized.values(self.base)))
        return base.at[jnp.array(self.rows)].set(self.value, unique_indices=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.base.shape


Adapters = dict[str, Any]  # an Adapter, or the Replacement of a leaf that is trained whole


def scaling(alpha: float, rank: int) -> float:
    """Return alpha / rank, the factor of the low-rank product."""
    return alpha / rank


def merge_dtype(dtype) -> jnp.dtype:
    """Return the dtype to add a low-rank product to a weight in: float32, or wider for wider."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
