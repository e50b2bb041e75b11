"""Replacements of a tree as what a PEFT folder has in the place of modules, biases and tokens."""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlora.formats import layouts, pieces
from jaxlora.formats.names import Names
from jaxlora.messages import checks
from jaxlora.targets.sites import Sites
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
        table = names.table({path: shape})
        for name, place in table.items():
            owner, _, last = name.rpartition(".")
            owner, last = (owner, last) if last in ("weight", "bias") else (name, "weight")
            if term.rows is not None and place.part is None and place.layout == "embedding":
                yield Kept(owner, last, np.asarray(term.value), term.rows)
                done = len(term.rows)
                break
            box = pieces.box(place.part, shape)
            index = _entry(term, box, path, str(place))
            if index is None:
                continue
            part = tuple(stop - start for start, stop in box)
            value = np.asarray(term.value)[index].reshape(part)
            done += part[0]
            yield Kept(owner, last, _tensor(value, path, place.layout, sites))
        needed = shape[0] if term.rows is None and shape else len(term.rows or ((),))
        if done != needed:
            raise ValueError(
                f"the replacement of {path!r} has parts that have no name in the file: give names "
                f"one for each of its entries: got {checks.shown(names)}"
            )


def _entry(term: Replacement, box: pieces.Box, path: str, place: str) -> tuple[slice, ...] | None:
    """Return which part of a replacement a place has, None for none of its rows."""
    if term.rows is None:
        return tuple(slice(*bounds) for bounds in box)
    start, stop = box[0]
    if stop - start != 1 or box[1:] != pieces.box(None, term.shape)[1:]:
        raise ValueError(
            f"rows of {path!r} are replaced, which must be modules of the file, or tokens of an "
            f"embedding: got the place {place!r}"
        )
    if start not in term.rows:
        return None
    row = term.rows.index(start)
    return (slice(row, row + 1),)


def _tensor(
    value: np.ndarray, path: str, layout: layouts.Layout, sites: Sites | None
) -> np.ndarray:
    """Return how an entry of a leaf lies in a tensor of the file."""
    if sites is not None:
        known = sites.sites | sites.dense
        roles = known[path].roles if path in known else None
    elif sum(size > 1 for size in value.shape) > 1 and layout != "embedding":
        raise ValueError(
            f"the weight {path!r} is replaced as a whole, and only the program tells how it lies: "
            "give sites=jaxlora.find_sites(fn, params, *args)"
        )
    else:
        roles = None
    if roles is None:
        return value if layout == "embedding" else value.squeeze()
    return layouts.tensor(value, roles, layout)


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


def tensors(found: Iterable[Kept], adapted: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Return the tensors by name."""
    yield from ((x.key(adapted), x.value) for x in found)
