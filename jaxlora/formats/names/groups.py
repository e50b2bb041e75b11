"""Names that differ in numbers alone, as one template: the layers of a model.

Numbers that run from 0 without a gap are placeholders, where all that they make has one shape.
Others stay as they are: the ``0`` of ``to_out.0`` is part of a name.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_NUMBER = re.compile(r"\d+")
LETTERS = "ijklmn"  # names of placeholders


@dataclasses.dataclass(frozen=True)
class Group:
    """Names that one template makes.

    Attributes:
        template: the template, ``"layers.{i}.q"``.
        counts: how many numbers each placeholder stands for.
        shape: the shape that all of them have.
    """

    template: str
    counts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nodes(self) -> frozenset[str]:
        """The names that dots or slashes part, those without a letter left out."""
        pieces = re.split(r"[./]", re.sub(r"\{.\}", "", self.template).lower())
        return frozenset(piece.strip("_") for piece in pieces if re.search("[a-z]", piece))

    @property
    def words(self) -> frozenset[str]:
        """The words of these names, and the names themselves."""
        pieces = (re.split(r"[^a-z]+", node) for node in self.nodes)
        return self.nodes | frozenset(word for words in pieces for word in words if word)


def groups(shapes: Mapping[str, Sequence[int]]) -> list[Group]:
    """Return names by their templates, in the order of the first of each.

    Args:
        shapes: the shape of each by name.
    """
    found: list[Group] = []
    by_text: dict[str, list[str]] = collections.defaultdict(list)
    for name in shapes:
        by_text[_NUMBER.sub("#", name)].append(name)
    for names in by_text.values():
        found += _split(names, shapes)
    return found


def _split(names: list[str], shapes: Mapping[str, Sequence[int]]) -> Iterator[Group]:
    """Return the groups of names that are alike but for their numbers."""
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    columns = [*zip(*numbers, strict=True)]
    varying = [d for d, column in enumerate(columns) if len({*column}) > 1]
    counts = tuple(len({*columns[d]}) for d in varying)
    own = {tuple(shapes[name]) for name in names}
    is_whole = (
        all({*columns[d]} == {*range(len({*columns[d]}))} for d in varying)
        and len({*numbers}) == len(names) == math.prod(counts)
        and len(own) == 1
        and len(varying) <= len(LETTERS)
    )
    if is_whole:
        yield Group(_template(names[0], varying), counts, own.pop())
        return
    if len(names) == 1 or not varying:
        yield from (Group(name, (), tuple(shapes[name])) for name in names)
        return
    # the numbers of one place are parts of names: those of the last that varies
    by_value: dict[int, list[str]] = collections.defaultdict(list)
    for name, row in zip(names, numbers, strict=True):
        by_value[row[varying[-1]]].append(name)
    for part in by_value.values():
        yield from _split(part, shapes)


def _template(name: str, varying: Sequence[int]) -> str:
    pieces, place = [], 0
    for d, found in enumerate(_NUMBER.finditer(name)):
        if d in varying:
            letter = LETTERS[varying.index(d)]
            pieces += [name[place : found.start()], f"{{{letter}}}"]
            place = found.end()
    return "".join([*pieces, name[place:]])
