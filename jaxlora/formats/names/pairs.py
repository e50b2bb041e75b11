"""Pairs of a name in a file and a place in a tree: two templates, or two functions."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

from jaxlora.messages import checks
from jaxlora.weights import blocks

Layout = Literal["linear", "embedding", "conv", "transposed", "tensor"]
Given = Sequence[str | Callable[..., object]]  # a pair as a user writes it
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_VALUE = r"\d+|[A-Za-z_]\w*?"
_PAIR = '("name in the file", "path in the tree") or with a layout behind them'


@dataclasses.dataclass(frozen=True)
class Templates:
    """Two templates.

    Attributes:
        file: template of the name.
        path: regular expression of the path, a group for each placeholder.
        axes: what stands behind the path for each axis, perhaps nothing.
        layout: how the module's weight lies in the file.
    """

    file: str
    path: re.Pattern[str]
    axes: tuple[str, ...]
    layout: Layout

    @classmethod
    def from_texts(cls, file: str, tree: str, layout: Layout) -> "Templates":
        """Return the templates of a name and a place."""
        path, text = blocks.parse(tree)
        given, wanted = ({*_PLACEHOLDER.findall(side)} for side in (tree, file))
        if given != wanted:
            lone = ", ".join(f"{{{name}}}" for name in sorted(given ^ wanted))
            raise ValueError(
                f"a placeholder must stand in both templates: {lone} is in one of {(file, tree)}"
            )
        axes = tuple(piece.strip() for piece in text.split(",")) if text is not None else ()
        return cls(file, re.compile(_expression(path)), axes, layout)

    def names(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str | None]]:
        """Return the names of a leaf, and what stands in brackets of each, None for nothing."""
        if (found := self.path.fullmatch(path)) is None:
            return
        values: dict[str, str] = found.groupdict()
        free = {
            name: axis
            for axis, piece in enumerate(self.axes[: len(shape)])
            for name in _PLACEHOLDER.findall(piece)
            if name not in values
        }
        for entry in itertools.product(*(range(shape[axis]) for axis in free.values())):
            entries = zip(free, map(str, entry), strict=True)
            known = collections.defaultdict(lambda: "0", values | dict(entries))
            pieces = [_filled(piece, known) for piece in self.axes]
            yield _filled(self.file, known), ", ".join(pieces) if pieces else None


@dataclasses.dataclass(frozen=True)
class Functions:
    """Two functions that stand for templates: of a name to its place, of a path to its names."""

    place: Callable[..., object]
    of_path: Callable[..., object]
    layout: Layout

    def names(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, str | None]]:
        """Return the names of a leaf, and what stands in brackets of each, None for nothing."""
        del shape
        found = self.of_path(path)
        for name in found if isinstance(found, Iterable) else ():
            place = self.place(name)
            if not isinstance(place, str) or (place != path and blocks.parse(place)[0] != path):
                raise ValueError(
                    f"the functions of a pair must agree: of the path {path!r} they return the "
                    f"name {name!r}, and of that the place {checks.shown(place)}"
                )
            yield str(name), None if place == path else blocks.parse(place)[1]


def pair(pair: object) -> Templates | Functions:
    """Return a pair as it was given, or raise for what is none."""
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) not in (2, 3):
        raise TypeError(f"names must be pairs, {_PAIR}: got {checks.shown(pair)}")
    first, second, *rest = pair
    layout = rest[0] if rest else "linear"
    checks.check_choice(layout, "layout", get_args(Layout))
    if isinstance(first, str) and isinstance(second, str):
        return Templates.from_texts(first, second, layout)
    if callable(first) and callable(second):
        return Functions(first, second, layout)
    shown = tuple(map(checks.shown, pair))
    raise TypeError(f"a pair of names must be two templates or two functions: got {shown}")


def within(pair: Given, file: str, tree: str) -> Given:
    """Return a pair of a part of a model as one of the whole."""
    name, place, *layout = pair
    if isinstance(name, str) and isinstance(place, str):
        return (file + name, tree + place, *layout)
    of_name, of_path = pair[:2]
    assert callable(of_name)
    assert callable(of_path)

    def longer(name: str) -> object:
        found = of_name(name.removeprefix(file)) if name.startswith(file) else None
        return tree + found if isinstance(found, str) else found

    def names_of(path: str) -> list[str]:
        found = of_path(path.removeprefix(tree)) if path.startswith(tree) else ()
        return [file + name for name in found] if isinstance(found, Iterable) else []

    return (longer, names_of, *layout)


def _expression(path: str) -> str:
    """Return the regular expression of a template for paths."""
    seen: set[str] = set()
    pieces = _PLACEHOLDER.split(path)  # text and placeholders by turns
    for i in range(1, len(pieces), 2):
        name = pieces[i]
        pieces[i] = f"(?P={name})" if name in seen else f"(?P<{name}>{_VALUE})"
        seen.add(name)
    return "".join(re.escape(p) if i % 2 == 0 else p for i, p in enumerate(pieces))


def _filled(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)
