"""Which name of a file stands for which place in a tree of parameters.

Files name the modules of a PyTorch model, ``model.layers.3.self_attn.q_proj``. Trees name leaves,
``params/layer_3/attn/query/kernel``, or have one leaf for all layers, or one for several modules.
A `Names` is a list of pairs that is read in both directions: for the leaves of a tree, whose
shapes are known, it lists every name and its place, so that no name is ever taken apart.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jaxlora.formats.names import pairs
from jaxlora.formats.names.pairs import Given, Layout
from jaxlora.messages import checks
from jaxlora.weights import blocks, paths
from jaxlora.weights.blocks import Part


@dataclasses.dataclass(frozen=True)
class Place:
    """A leaf of a tree, or a part of one.

    Attributes:
        path: path of the leaf.
        part: the part of it, None for all of it.
        layout: how the module's weight lies in the file.
        order: which of the pairs it is of.
        indexed: axes along which it has one entry, told by an index.
        is_bias: whether its name is that of a bias.
    """

    path: str
    part: Part | None
    layout: Layout
    order: int = 0
    indexed: tuple[int, ...] = ()
    is_bias: bool = False

    def __str__(self) -> str:
        return blocks.name(self.path, self.part)


class Names:
    """Pairs of templates: a name in a file, and the place in a tree that it stands for.

    A name is that of a module, ``"encoder.{i}.query"``, and stands for its ``weight``; or of any
    other tensor, ``"encoder.{i}.query.bias"``. A place is the path of a leaf, with an index or
    slices behind it for a part of one: ``"params/layers/mlp/kernel[{i}]"`` for the layers of a
    scanned model, ``"params/qkv/kernel[:, 0:64]"`` for a module that is a part of a leaf.

    A placeholder in braces is a number or a name. It stands in both templates; behind a path it
    runs over the entries of an axis.

    PEFT tells several parameters of one module, as those of experts, by their order alone: their
    pairs stand in the order in which the module has them.

    Args:
        *given: ``(name, place)``, or ``(name, place, layout)``. The layout tells how the weight of
            the module lies in the file: ``"linear"`` (out, in), which is the default;
            ``"embedding"`` (rows, columns); ``"conv"`` (out, in, window); ``"transposed"``
            (in, out), as of the ``Conv1D`` of GPT-2; ``"tensor"``: the name is that of a tensor
            itself, as ``"cls_token"`` or ``"norm.running_mean"``, which lies as its leaf. Where no
            template can tell the names, a pair may be two functions: of a name, that returns its
            place or None, and of a path, that returns the names of the modules that the leaf
            holds, perhaps none.

    Raises:
        TypeError: a pair is none.
        ValueError: a placeholder stands in one of two templates alone, or a layout is unknown.

    >>> from jaxlora.formats import Names
    >>> names = Names(("h.{i}.{p}_proj", "layers/{p}/kernel[{i}]"), ("head", "head/kernel"))
    >>> table = names.table({"layers/up/kernel": (2, 4, 8), "head/kernel": (4, 9)})
    >>> for name, place in table.items():
    ...     print(name, "=", place)
    h.0.up_proj = layers/up/kernel[0:1, :, :]
    h.1.up_proj = layers/up/kernel[1:2, :, :]
    head = head/kernel
    """

    def __init__(self, *given: Given):
        self._pairs = [pairs.pair(pair) for pair in given]
        self._shown = given

    def __repr__(self) -> str:
        return f"Names{self._shown!r}"

    def __str__(self) -> str:
        """Return it as code."""
        lines = [f"    {pair!r}," for pair in self._shown]
        return "\n".join(["Names(", *lines, ")"]).replace("'", '"')

    def within(self, *, file: str = "", tree: str = "") -> "Names":
        """Return names of a part of a model as those of the whole.

        Args:
            file: what stands before every name, as ``"bert."``.
            tree: what stands before every path, as ``"params/encoder/"``.

        Raises:
            TypeError: one is no string.

        >>> from jaxlora.formats import Names
        >>> print(Names(("pooler.dense", "pooler/kernel")).within(file="bert.", tree="params/"))
        Names(
            ("bert.pooler.dense", "params/pooler/kernel"),
        )
        """
        for name, value in {"file": file, "tree": tree}.items():
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string: got {checks.shown(value)}")
        return Names(*(pairs.within(pair, file, tree) for pair in self._shown))

    def table(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
        """Return every name that a tree has, and its place.

        Args:
            shapes: the shape of each leaf by path.

        Returns:
            Places by name, in the order of the leaves and their entries; a leaf that fits no
            template has no name.

        Raises:
            ValueError: one name stands for two places, or one place has two names; a part does
                not fit the shape of its leaf.
        """
        found: dict[str, Place] = {}
        for path, shape in shapes.items():
            own: dict[str, Place] = {}
            for name, place in self._of_leaf(path, tuple(shape)):
                if (known := own.get(name, found.get(name))) not in (None, place):
                    _refuse_twice(name, known, place)
                own[name] = place
            for one, other in _overlapping({name: place.part for name, place in own.items()}):
                raise ValueError(
                    f"a place must have one name: {str(own[other])!r} is {one!r} and {other!r}"
                )
            found |= own
        return found

    def _of_leaf(self, path: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
        for order, pair in enumerate(self._pairs):
            for name, text in pair.names(path, shape):
                pieces = [] if text is None else [piece.strip() for piece in text.split(",")]
                indexed = tuple(axis for axis, piece in enumerate(pieces) if piece.isdecimal())
                slices = None if text is None else ", ".join(map(_sliced, pieces))
                try:
                    part = blocks.resolve(slices, shape)
                    yield name, Place(path, part, pair.layout, order, indexed, _is_bias(name))
                except ValueError as error:
                    raise ValueError(f"the place of {name!r} in {path!r}: {error}") from error


def module_and_tensor(name: str) -> tuple[str, str]:
    """Return the module that a name is of, and which tensor of it: its weight or its bias."""
    owner, _, last = name.rpartition(".")
    return (owner, last) if last in ("weight", "bias") else (name, "weight")


def missing(name: str, table: Iterable[str]) -> str:
    """Return what is wrong with a name that is not in a table, and which are like it."""
    near = paths.nearest(name.replace(".", "/"), {key.replace(".", "/"): key for key in table})
    return f"no name of the tree is {name!r}; {near.replace('/', '.')}"


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _sliced(piece: str) -> str:
    """Return an index as the slice of one entry, anything else as it is."""
    return f"{piece}:{int(piece) + 1}" if re.fullmatch(r"\d+", piece) else piece


def _refuse_twice(name: str, one: Place | None, other: Place) -> None:
    if str(one) == str(other):
        raise ValueError(
            f"two pairs of names make {name!r} for {str(other)!r}: leave one of them out"
        )
    raise ValueError(f"the name {name!r} stands for two places: {one}, {other}")


def _overlapping(parts: Mapping[str, Part | None], axis: int = 0) -> Iterator[tuple[str, str]]:
    """Return the names of parts of one leaf that have an element in common, two by two.

    They are compared along one axis after the other, so that of many entries few pairs are.
    """
    if any(part is None or axis == len(part) for part in parts.values()):
        twos = itertools.combinations(parts, 2)
        yield from ((a, b) for a, b in twos if blocks.overlap(parts[a], parts[b]))
        return
    bounds = {name: part[axis] or (0, math.inf) for name, part in parts.items() if part}
    near: list[str] = []
    end: float = 0
    for name in sorted(bounds, key=lambda name: bounds[name][0]):
        if bounds[name][0] >= end:  # none of those before reaches it
            if len(near) > 1:
                yield from _overlapping({n: parts[n] for n in near}, axis + 1)
            near = []
        near.append(name)
        end = max(end, bounds[name][1])
    if len(near) > 1:
        yield from _overlapping({n: parts[n] for n in near}, axis + 1)
