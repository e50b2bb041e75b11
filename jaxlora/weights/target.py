"""What is to be adapted: a weight or a block of one, and the numbers of its factors."""

from typing import NamedTuple

from jaxlora.weights.blocks import Part


class Target(NamedTuple):
    """A weight to adapt, or a part of one.

    Attributes:
        path: path of the leaf.
        part: the block of it that is adapted, None for all of it.
        rank: rank of its factors.
        alpha: numerator of their scaling alpha / rank.
    """

    path: str
    part: Part | None
    rank: int
    alpha: float
