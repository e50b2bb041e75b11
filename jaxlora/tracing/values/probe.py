"""What flows through a program in the place of a leaf, to find out how the program uses it.

Its labels are sets of original axes, each a path and an axis number. An evaluation of the program
with a probe for each leaf finds the sites: where a probe is consumed, the labels of what is summed,
kept and in the batch tell the roles.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Self

import jax
from jax.typing import DTypeLike

from jaxlora.tracing.values import axes, deferred
from jaxlora.tracing.values.weight import STATIC, Origin, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Weight):
    """A leaf on its way through a program, without factors.

    Attributes:
        scanned: labels of axes that a loop runs over, or a constant index picks from, which are
            a stack for sure.
    """

    scanned: frozenset = dataclasses.field(default=frozenset(), metadata=STATIC)

    @classmethod
    def enter(cls, path: str, leaf: jax.Array) -> Self:
        """Return the probe of a leaf, each axis of which has a label of its own."""
        dims = tuple(((frozenset({(path, i)}), size),) for i, size in enumerate(leaf.shape))
        return cls(leaf, dims, Origin((path,), None, tuple(leaf.shape)))

    def labels(self, *dims: int) -> frozenset:
        """Return the original axes that dimensions are made of."""
        return self.shared_label(axes.labels([self.dims[d] for d in dims]))

    def is_rows(self) -> bool:
        """Tell whether something is left of each entry that was picked out."""
        rest = self.labels(*range(len(self.dims))) - self.picked
        return bool(self.picked) and (bool(rest) or len(self.indexed) > 1)

    def is_rows_to(self, in_: frozenset, out: frozenset) -> bool:
        """Tell whether what was picked is no matrix to a product."""
        return bool(self.indexed) and not (in_ and out)

    def is_whole(self, along: Sequence[int]) -> bool:
        """Tell whether an entry has dimensions left: nothing is a stack yet."""
        return len(along) < len(self.dims)

    def dim(self, pieces: Iterable[axes.Piece]) -> axes.Dim:
        """Return a dimension of these pieces."""
        return tuple(pieces)

    def repeated(self, times: int, dim: axes.Dim = ()) -> axes.Dim:
        """Return a dimension in which no axis is where something repeats."""
        copies: axes.Dim = ((frozenset(), times),) if times != 1 else ()
        return axes.merge((copies + dim,))[0]

    def shared_label(self, labels: Iterable[axes.Label]) -> frozenset:
        """Return the axes of all labels."""
        return frozenset().union(*labels)

    def entry(self) -> Self:
        """Return the bookkeeping of an entry, which make the axis a stack."""
        return self.scanned_over(self.labels(0)).replace(dims=self.dims[1:])

    def stacked(self, length: int, scanned: Sequence[Weight]) -> Self:
        """Return this with the axis first again that a loop ran over."""
        source = [weight for weight in scanned if weight.origin == self.origin]
        label = source[0].labels(0) if source else frozenset()
        dims = (((label, length),), *self.dims)
        return self.replace(dims=dims, scanned=self.scanned - label)

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """Return the leaf: there is nothing to add."""
        del dtype
        return deferred.now(self.base)

    def known_stack(self) -> frozenset:
        """Return what loops run over."""
        return self.scanned

    def scanned_over(self, labels: frozenset) -> Self:
        """Return this with axes that are a stack for sure."""
        return self.replace(scanned=self.scanned | labels)
