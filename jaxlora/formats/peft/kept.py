"""Replacements of a tree as what a PEFT folder has in the place of modules, biases and tokens."""

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.formats import pieces
from jaxlora.formats.layouts import arrangement, check_untied
from jaxlora.formats.names.mapping import Names, Place, module_and_tensor
from jaxlora.targets.sites import Sites
from jaxlora.weights import blocks
from jaxlora.weights.adapters import Replacement


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tensor in the place of one of the base, or rows of it.

    Attributes:
        owner: the module.
        last: what it is of the module, ``"weight"`` or ``"bias"``.
        value: the tensor, or the rows.
        rows: which rows of an embedding, None for all.
    """

    owner: str
    last: str
    value: np.ndarray
    rows: tuple[int, ...] | None = None

    def key(self, adapted: Container[str]) -> str:
        """Return its name in the file, some modules being adapted."""
        if self.rows is not None:
            return f"{self.owner}.token_adapter.trainable_tokens_delta"
        beneath = ".base_layer" if self.owner in adapted else ""
        return f"{self.owner}{beneath}.{self.last}"


def kept(
    replacements: Mapping[str, Replacement], names: Names, sites: Sites | None
) -> Iterator[Kept]:
    """Return what replacements are in a file.

    Raises:
        ValueError: one has no name, or the program is needed to tell how it lies.
    """
    for path, term in replacements.items():
        shape, done = tuple(term.shape), 0
        for name, place in names.table({path: shape}).items():
            if place.layout == "tensor":
                raise ValueError(
                    f"{path!r} is replaced, and is the tensor {name!r}, which is of no module that "
                    "PEFT could save: merge it"
                )
            owner, last = module_and_tensor(name)
            value = np.asarray(term.value)
            if term.rows is not None and place.part is None and place.layout == "embedding":
                yield Kept(owner, last, value, term.rows)
                done += value.size
                continue
            if (index := _index(term, place)) is None:
                continue
            part = value[index].reshape(blocks.shape(place.part, shape))
            done += part.size
            yield Kept(owner, last, _tensor(part, place, shape, sites))
        if done != term.value.size:
            raise ValueError(
                f"the replacement of {path!r} has parts that have no name in the file: give names "
                f"one for each of its {term.value.size} elements: got {done}, with {names}"
            )


def _index(term: Replacement, place: Place) -> tuple[slice, ...] | None:
    """Return which part of a replacement a place has, None for none of its rows."""
    if term.rows is None:
        return blocks.slices(place.part)
    (start, stop), *rest = pieces.box(place.part, term.shape)
    if stop - start != 1 or rest != [*pieces.box(None, term.shape)[1:]]:
        raise ValueError(
            f"rows of {place.path!r} are replaced, which must be modules of the file, or tokens of "
            f"an embedding: got the place {str(place)!r}"
        )
    row = term.rows.index(start) if start in term.rows else None
    return None if row is None else (slice(row, row + 1),)


def _tensor(
    part: np.ndarray, place: Place, whole: tuple[int, ...], sites: Sites | None
) -> np.ndarray:
    """Return how a part of a leaf lies in a tensor of the file."""
    if place.is_bias or sum(size > 1 for size in whole) < 2:
        return part.reshape(-1)
    if sites is None:
        raise ValueError(
            f"the weight {place.path!r} is replaced as a whole, and only the program tells how it "
            "lies: give sites=jaxlora.find_sites(fn, params, *args)"
        )
    check_untied(sites, place, "its folder")
    if (found := arrangement(sites, place, whole)) is None:
        return part.reshape([n for axis, n in enumerate(part.shape) if axis not in place.indexed])
    if math.prod(found.roles.sizes(part.shape)[0]) != 1:
        raise ValueError(
            f"the place {str(place)!r} must be one entry of its stack, as a module is: write an "
            "index behind its path in the names"
        )
    return found.tensor(part)


def check_whole(found: Sequence[Kept], sites: Sites | None, names: Names) -> None:
    """Raise if a module of which one tensor is replaced has others that are not.

    PEFT saves such a module whole, and every module whose name ends as its name.
    """
    if sites is None:
        return
    saved = tuple({x.owner for x in found if x.last == "weight" and x.rows is None})
    held = {f"{x.owner}.{x.last}" for x in found}
    for name in names.table(sites.shapes):
        owner, last = module_and_tensor(name)
        if saved and owner.endswith(saved) and f"{owner}.{last}" not in held:
            raise ValueError(
                f"PEFT saves modules whole, and all that end as {sorted(saved)}: {name!r} must be "
                "trained too, or none of them"
            )


def config(found: Sequence[Kept], adapted: Container[str]) -> dict[str, Any]:
    """Return what the config says of tensors in the place of the base's."""
    saved = sorted({x.owner for x in found if x.last == "weight" and x.rows is None})
    biases = {x.owner for x in found if x.last == "bias"} - {*saved}
    rows = {x.owner: [*x.rows] for x in found if x.rows is not None}
    about: dict[str, Any] = {}
    if saved:
        about["modules_to_save"] = saved
    if biases:
        about["bias"] = "lora_only" if all(owner in adapted for owner in biases) else "all"
    if rows:
        about["trainable_token_indices"] = rows
    return about
