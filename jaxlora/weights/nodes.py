"""The nodes that stand in a tree for what is trained of it.

Each holds its frozen ``base`` and the ``terms`` that are trained (`jaxlora.weights.adapters`). With
the deltas of its terms the weight in effect of a `LoRAWeight` is ``base + sum(deltas)``.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlora.types import Leaf
from jaxlora.weights import blocks, placed, quantized
from jaxlora.weights.adapters import Adapter, Replacement
from jaxlora.weights.opaque import Opaque
from jaxlora.weights.roles import Roles

_NODE = "call the function as jaxlora.lora(fn), or fold the adapters in with jaxlora.merge(params)"


class Node(Opaque):
    """What the nodes have in common: a frozen leaf, and what is trained of it."""

    instead = _NODE

    base: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        return self.base.shape

    @property
    def dtype(self) -> Leaf:
        """Dtype of the leaf."""
        return self.base.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAWeight(Node):
    """An adapted weight, in the place of the leaf that it adapts.

    It is a pytree node; `jaxlora.lora` makes functions accept it where they take an array. It has
    one term, or one for each block of the weight that is adapted. Of a weight with one term, the
    fields of the term can be read from the node.

    Attributes:
        base: the frozen weight, of any shape and floating dtype or quantized.
        terms: the factors of the weight, or of each block of it that is adapted; no element of the
            weight is in two of them, and all have the same roles.
        dropout_keys: None, or one random key for each stack entry, ``(*stack,)``.
        dropout_rate: share of the low-rank path's input that is dropped.
    """

    base: Leaf
    terms: tuple[Adapter, ...]
    dropout_keys: Leaf = None
    dropout_rate: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def term(self) -> Adapter:
        """The only term.

        Raises:
            ValueError: there are several.
        """
        if len(self.terms) != 1:
            raise ValueError(
                f"the weight has a term for each of {len(self.terms)} parts: use terms"
            )
        return self.terms[0]

    @property
    def roles(self) -> Roles:
        """Roles of the axes of the weight."""
        return self.terms[0].roles

    @property
    def a(self) -> Leaf:
        """Factor of the only term on the input side, ``(*stack, *in, rank)``."""
        return self.term.a

    @property
    def b(self) -> Leaf:
        """Factor of the only term on the output side, ``(*stack, rank, *out)``."""
        return self.term.b

    @property
    def magnitude(self) -> Leaf:
        """Magnitude of the only term, or None."""
        return self.term.magnitude

    @property
    def alpha(self) -> float:
        """Numerator of the scaling of the only term."""
        return self.term.alpha

    @property
    def rank(self) -> int:
        """Rank of the only term."""
        return self.term.rank

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product of the only term, alpha / rank."""
        return self.term.scaling

    @property
    def changed(self) -> str:
        """Name of the initializer that took the first product of the only term out of the base."""
        return self.term.changed

    @property
    def has_magnitude(self) -> bool:
        """Whether a term has a magnitude."""
        return any(term.magnitude is not None for term in self.terms)

    def delta(self) -> jax.Array:
        """Return the sum of the deltas of the terms, dense, in float32 or wider."""
        return sum(
            (term.delta(self.base) for term in self.terms[1:]), self.terms[0].delta(self.base)
        )

    def __repr__(self):
        base = getattr(self.base, "shape", self.base)
        parts = [f"base={base}{blocks.name('', t.block)}, {t.brief()}" for t in self.terms]
        return f"LoRAWeight({'; '.join(parts)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedLeaf(Node):
    """A leaf that is trained whole or by rows, in its place; `jaxlora.lora` passes what it is now.

    Attributes:
        base: the leaf as it was.
        replacement: its values as they are trained.
    """

    base: Leaf
    replacement: Replacement

    @property
    def terms(self) -> tuple[Replacement]:
        """What is trained of it."""
        return (self.replacement,)

    @property
    def value(self) -> Leaf:
        """The leaf as it is trained, or its rows, ``(len(rows), ...)``."""
        return self.replacement.value

    @property
    def now(self) -> jax.Array:
        """The leaf as it is trained, in its own dtype.

        By rows it has a copy of the others, which get no gradient.
        """
        value, rows = self.replacement.value, self.replacement.rows
        dtype = jax.dtypes.canonicalize_dtype(self.base.dtype)
        value = value if value.dtype == dtype else value.astype(dtype)
        if rows is None:
            return value
        base = jax.lax.stop_gradient(quantized.values(self.base))
        axes = tuple(range(base.ndim))
        return placed.run(_with_rows, rows, (base, value), base, axes)


def _with_rows(base: Leaf, value: Leaf, rows: tuple[int, ...]) -> jax.Array:
    """Return a leaf with other values in some rows."""
    return jnp.asarray(base).at[jnp.array(rows)].set(value, unique_indices=True)


def over(base: Leaf, terms: Sequence[Adapter | Replacement]) -> LoRAWeight | TrainedLeaf:
    """Return the node of terms of one kind over a leaf."""
    if replaced := [term for term in terms if isinstance(term, Replacement)]:
        return TrainedLeaf(base, *replaced)
    return LoRAWeight(base, tuple(term for term in terms if isinstance(term, Adapter)))
