"""Adapters of a tree as the factors of the modules that a file names."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxlora.formats import pieces
from jaxlora.formats.factorizations import wide
from jaxlora.formats.layouts import Arrangement, arrangement, check_untied
from jaxlora.formats.names.mapping import Names, Place
from jaxlora.formats.pieces import Box
from jaxlora.messages import checks
from jaxlora.targets.sites import Sites
from jaxlora.tracing.recorder import Kind
from jaxlora.weights import blocks
from jaxlora.weights.adapters import Adapter, scaling
from jaxlora.weights.roles import Roles


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of a file, and the adapters that it has a part of.

    Attributes:
        name: its name.
        place: the leaf or part that it is.
        terms: adapters of that part, by name, NumPy's arrays.
    """

    name: str
    place: Place
    terms: Mapping[str, Adapter]

    @property
    def first(self) -> Adapter:
        """One of its adapters, which has what all have."""
        return next(iter(self.terms.values()))

    @property
    def roles(self) -> Roles:
        """Roles of the leaf's axes."""
        return self.first.roles

    @property
    def box(self) -> Box:
        """The bounds of its part along every axis of the leaf."""
        return pieces.box(self.place.part, self.first.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its part."""
        return blocks.shape(self.place.part, self.first.shape)

    @property
    def entries(self) -> int:
        """Number of weights in its part: 1, or more where a parameter holds all experts."""
        return math.prod(self.roles.sizes(self.shape)[0])

    @property
    def rank(self) -> int:
        """The sum of the ranks of its adapters."""
        return sum(term.rank for term in self.terms.values())

    @property
    def alpha(self) -> float:
        """The alpha with which its factors are scaled as those of its adapters are."""
        scales = {scaling(term.alpha, term.rank) for term in self.terms.values()}
        return self.first.alpha * self.rank / self.first.rank if len(scales) == 1 else self.rank

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ``a``, ``(*stack, *in, rank)``, and ``b``, ``(*stack, rank, *out)``.

        Those of several adapters stand side by side, with zeros outside of their blocks, so that
        the product is the sum of theirs. Where these are scaled differently, ``b`` takes it.
        """
        scale, count = scaling(self.alpha, self.rank), len(self.roles.stack)
        in_ = (*self.roles.stack, *self.roles.in_, None)
        out = (*self.roles.stack, None, *self.roles.out)
        a, b = [], []
        for term in self.terms.values():
            a.append(self._within(np.asarray(term.a), term, in_))
            b.append(self._within(_scaled(term, scale), term, out))
        return (a[0], b[0]) if len(a) == 1 else (np.concatenate(a, -1), np.concatenate(b, count))

    def tensors(self, how: Arrangement) -> tuple[np.ndarray, np.ndarray]:
        """Return the tensors of ``A`` and ``B``, its part being one entry of its stack."""
        a, b = self.factors()
        stack = len(self.roles.stack)
        a, b = a.reshape(a.shape[stack:]), b.reshape(b.shape[stack:])
        return how.tensors(a, b, self.shape)

    def magnitude(self) -> np.ndarray | None:
        """Return the magnitude ``(*stack, *out)`` of its part."""
        if self.first.magnitude is None:
            return None
        axes = (*self.roles.stack, *self.roles.out)
        whole = pieces.box(None, self.first.shape)
        if any(self.box[axis] != whole[axis] for axis in self.roles.in_) or self.entries > 1:
            raise ValueError(
                f"the magnitude of {str(self.place)!r} cannot be written: the norm of a column is "
                "that of all of its rows, and of one expert; merge it"
            )
        return self._within(np.asarray(self.first.magnitude), self.first, axes)

    def _within(self, array: np.ndarray, term: Adapter, axes: tuple[int | None, ...]) -> np.ndarray:
        """Return what an array of an adapter is in this part, with zeros where it has nothing."""
        own, cut, around = pieces.box(term.block, term.shape), [], []
        for axis in axes:
            if axis is None:
                cut.append(slice(None))
                around.append((0, 0))
                continue
            (start, stop), (low, high) = self.box[axis], own[axis]
            first, last = max(start, low), min(stop, high)
            cut.append(slice(first - low, last - low))
            around.append((first - start, stop - last))
        part = array[tuple(cut)]
        return np.pad(part, around) if any(map(any, around)) else part


def _scaled(term: Adapter, scale: float) -> np.ndarray:
    """Return ``b`` of an adapter for another scaling of the product."""
    b, own = np.asarray(term.b), scaling(term.alpha, term.rank)
    return b if own == scale else (wide(b) * (own / scale)).astype(b.dtype)


def modules(adapters: Mapping[str, Adapter], names: Names) -> Iterator[Module]:
    """Return the modules that adapters are for, in the order of their leaves.

    Raises:
        ValueError: a part of an adapter has no name.
    """
    leaves: dict[str, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        path = name if adapter.block is None else blocks.parse(name)[0]
        leaves.setdefault(path, {})[name] = adapter
    for path, terms in leaves.items():
        shape = next(iter(terms.values())).shape
        covered = dict.fromkeys(terms, 0)
        for module, place in names.table({path: shape}).items():
            own = {
                name: term for name, term in terms.items() if blocks.overlap(place.part, term.block)
            }
            if not own:
                continue
            found = Module(module, place, own)
            for name, term in own.items():
                covered[name] += _shared(found.box, pieces.box(term.block, shape))
            yield found
        for name, term in terms.items():
            if covered[name] != math.prod(blocks.shape(term.block, shape)):
                has = "no name" if not covered[name] else "parts that have no name"
                raise ValueError(
                    f"the adapter {name!r} of a weight of shape {shape} has {has} in the file; "
                    f"give names one for {path!r}: got {checks.shown(names)}"
                )


def _shared(one: Box, other: Box) -> int:
    """Return how many elements two blocks have in common."""
    pairs = zip(one, other, strict=True)
    return math.prod(max(min(a[1], b[1]) - max(a[0], b[0]), 0) for a, b in pairs)


def arranged(module: Module, sites: Sites | None) -> Arrangement:
    """Return how the weight of a module lies, or raise if its adapter does not travel."""
    place, shape = module.place, module.first.shape
    if sites is None:
        if place.layout == "conv":
            raise ValueError(
                f"{str(place)!r} is a kernel, and only the program tells which of its axes are the "
                "window: give sites=jaxlora.find_sites(fn, params, *args)"
            )
        return Arrangement(module.roles, place.layout)
    check_untied(sites, place, "the file")
    found = arrangement(sites, place, shape)
    uses = {use.kind for use in sites[place.path].uses} if found else set()
    if found is None or (uses == {Kind.LOOKED_UP}) != (place.layout == "embedding"):
        raise ValueError(
            f"the layout of {str(place)!r} must be 'embedding' if and only if the program looks "
            f"rows of it up: got {place.layout!r}"
        )
    return dataclasses.replace(found, roles=module.roles)


def norms(module: Module, first: np.ndarray) -> np.ndarray | None:
    """Return the magnitude of a module as PEFT's layers have it, whose tensor ``A`` is given."""
    magnitude, window = module.magnitude(), (1,) * (first.ndim - 2)
    if magnitude is None:
        return None
    return magnitude.reshape((1, -1, *window) if window else (-1,))


def check_written(adapters: Mapping[str, Adapter]) -> None:
    """Raise for an adapter that files cannot say.

    It is of the base as it was, which they name, and its alpha is above 0, as 0 means its rank.
    """
    for name, term in adapters.items():
        if not term.alpha > 0:
            raise ValueError(
                f"the alpha of the adapter {name!r} must be above 0 in a file: got {term.alpha}; "
                "multiply b by its sign, or leave the adapter out"
            )
        if term.changed:
            raise ValueError(
                f"the adapter {name!r} started with {term.changed!r}, which changed its base: make "
                "it one of the base as it was, with jaxlora.algebra.rebase"
            )
