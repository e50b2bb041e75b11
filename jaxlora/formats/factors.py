"""The factors of one module of a file, in whatever form the file has them."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxlora.formats import factorizations
from jaxlora.formats.factorizations import Form
from jaxlora.formats.layouts import Arrangement, check_untied
from jaxlora.formats.names.mapping import Place
from jaxlora.formats.source import Source
from jaxlora.weights import blocks
from jaxlora.weights.roles import Roles

Tensors = Mapping[str, str]  # names of the tensors of a module, by what they are of it
_BESIDE = ("magnitude", "alpha")  # what may stand beside the tensors of a form


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of a module.

    Attributes:
        a: ``(*stack, *in, rank)``.
        b: ``(*stack, rank, *out)``.
        form_rank: the rank that the file means, by whose scaling the product is multiplied.
    """

    a: np.ndarray
    b: np.ndarray
    form_rank: int

    @property
    def rank(self) -> int:
        """Number of columns of ``a``."""
        return self.a.shape[-1]

    def alpha(self, form_alpha: float) -> float:
        """Return the alpha that scales the product as an alpha of the file's rank does."""
        return form_alpha * (self.rank // self.form_rank)


def adaptable(source: Source, place: Place, tensor: str) -> Arrangement:
    """Return how a weight lies that has an adapter, or raise if it can have none."""
    if (found := source.arrangement(place)) is None:
        why = source.sites.skipped.get(place.path, "it is no weight")
        raise ValueError(
            f"the leaf {place.path!r}, for which {source.where} has {tensor!r}, cannot be "
            f"adapted: {why}"
        )
    check_untied(source.sites, place, source.where)
    return found


def form(source: Source, own: Tensors) -> Form:
    """Return the form that the tensors of a module are, or raise if one lacks."""
    kinds = {*own} - {*_BESIDE}
    found = factorizations.form_of(kinds)
    if found is None:
        lacking = factorizations.missing(kinds)
        shown = own[min(kinds)] if kinds else next(iter(own.values()))
        if lacking is None:
            raise ValueError(
                f"{source.where} has tensors of one module that do not belong together: "
                f"{sorted(own.values())}"
            )
        raise ValueError(f"{source.where} has {shown!r}, and no tensor {min(lacking)} beside it")
    return found


def read(source: Source, own: Tensors, place: Place, how: Arrangement) -> Factors:
    """Return the factors of a module, ``(*stack, ...)`` of one entry.

    Raises:
        ValueError: a tensor lacks, or does not fit its place.
    """
    made = form(source, own)
    _, shape = source.box(place)
    stack, _, _ = how.roles.sizes(shape)
    if math.prod(stack) != 1:
        raise ValueError(
            f"the place of {next(iter(own.values()))!r}, {str(place)!r}, must be one entry of its "
            f"stack: got {math.prod(stack)} of them; write an index behind the path in the names"
        )
    form_rank = made.rank({kind: source.file.shapes[own[kind]] for kind in made.kinds})
    needed = made.shapes(*how.factor_shapes(shape, form_rank))
    tensors = {kind: source.tensor(own[kind], place, size) for kind, size in needed.items()}
    return of_pair(*made.pair(tensors), how, shape, form_rank)


def of_pair(
    first: np.ndarray, second: np.ndarray, how: Arrangement, shape: tuple[int, ...], form_rank: int
) -> Factors:
    """Return the factors of an entry of some shape, from the tensors ``A`` and ``B`` of PyTorch."""
    (stack, in_, out), rank = how.roles.sizes(shape), len(first)
    shapes = how.factor_shapes(shape, rank)
    a, b = how.factors(first.reshape(shapes[0]), second.reshape(shapes[1]), shape)
    return Factors(a.reshape(*stack, *in_, rank), b.reshape(*stack, rank, *out), form_rank)


def magnitude(source: Source, tensor: str, place: Place, roles: Roles) -> np.ndarray:
    """Return the magnitude ``(*stack, *out)`` of a module."""
    if not blocks.has_all_of(place.part, roles.in_):
        raise ValueError(
            f"the magnitude {tensor!r} of {source.where} must be of whole columns, all along the "
            f"in axes {roles.in_} of the leaf: got {str(place)!r}"
        )
    stack, _, out = roles.sizes(source.box(place)[1])
    return source.flat(tensor, place, (*stack, *out))
