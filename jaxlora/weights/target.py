"""What is to be adapted: a weight or a block of one, and the numbers of its factors."""

from typing import NamedTuple

from jaxlora.weights import blocks


class Target(NamedTuple):
    """A weight to adapt, or a block of one.

    Attributes:
        path: path of the leaf.
        block: the block of it that is adapted, None for all of it.
        rank: rank of its factors.
        alpha: numerator of their scaling alpha / rank.
    """

    path: str
    block: blocks.Part | None
    rank: int
    alpha: float

    @property
    def name(self) -> str:
        """The path, with the slices of the block behind it."""
        return blocks.name(self.path, self.block)
