"""Factors of parameters that hold a weight for each expert, which PEFT saves as one pair.

The rows of ``A`` are ``(expert, rank)`` and the columns of ``B`` ``(rank, expert)``. The name of
the parameter is not in the file: of several of one module the factors are nested, those of the
first parameter of the module innermost. On which side of the weight ``A`` is depends on the version
that wrote it: up to 0.18 on the first axis of the tensor, in 0.19 on its out axis, later on its in
axis. What shapes tell is more certain than either.
"""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxlora.formats.names import Place
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft import folder as folders
from jaxlora.formats.peft.folder import Folder
from jaxlora.formats.peft.keys import Key
from jaxlora.formats.peft.modules import Module
from jaxlora.weights.roles import Roles

Side = Literal["in", "out"]
Keys = Mapping[str, Key]


def parameters(folder: Folder, modules: Mapping[folders.Module, Keys]) -> dict[folders.Module, str]:
    """Return by module and depth the parameter that its factors are for.

    Raises:
        ValueError: the file has other factors than the config names parameters.
    """
    targets = folder.config.get("target_parameters", ())
    found: dict[folders.Module, str] = {}
    for module in {module for module, _ in modules}:
        own = [
            f"{module}.{target.rpartition('.')[2]}"
            for target in targets
            if configs.named(module, [target.rpartition(".")[0]])
        ]
        depths = sorted((depth for other, depth in modules if other == module), reverse=True)
        if own and len(own) != len(depths):
            raise ValueError(
                f"{folder.where} must have a pair of factors for each of {own}: got {len(depths)}"
            )
        if own:
            names = _in_order(folder, own, [modules[module, depth] for depth in depths])
            found |= {(module, d): name for d, name in zip(depths, names, strict=True)}
    return found


def _in_order(folder: Folder, names: list[str], pairs: list[Keys]) -> Sequence[str]:
    """Return the parameters of one module in the order of their factors, the innermost first.

    It is the order in which the names list them, or else the first that fits the shapes.
    """
    places = {name: folder.place(name, pairs[0]["A"]) for name in names}
    names = sorted(names, key=lambda name: places[name].order)

    def fits(order: Sequence[str], *, as_usual: bool) -> bool:
        for name, own in zip(order, pairs, strict=True):
            sides = _sides(folder, own, places[name])
            if not sides or (as_usual and _usual(folder, places[name]) not in sides):
                return False
        return True

    for as_usual in (True, False):
        for order in itertools.permutations(names):
            if fits(order, as_usual=as_usual):
                return order
    return names


def of_experts(roles: Roles, shape: tuple[int, ...]) -> Roles:
    """Return the roles of the axes of a leaf of which experts are a stack.

    A program that multiplies all experts at once does not tell so. It is the first axis then.

    Args:
        roles: as the program tells them.
        shape: shape of the place of one parameter.
    """
    if any(shape[axis] > 1 for axis in roles.stack):
        return roles
    first = min({*roles.in_, *roles.out})
    in_, out = (tuple(x for x in axes if x != first) for axes in (roles.in_, roles.out))
    return Roles(tuple(sorted((*roles.stack, first))), in_, out)


def factors(
    folder: Folder, own: Keys, place: Place, roles: Roles, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors ``(*stack, *in, rank)`` and ``(*stack, rank, *out)`` of a parameter."""
    stack, in_, out = roles.sizes(shape)
    count = math.prod(stack)
    if not (sides := _sides(folder, own, place)):
        first, second = (folder.file.shapes[own[kind].name] for kind in "AB")
        raise ValueError(
            f"the tensors {own['A'].name!r} and {own['B'].name!r} of {folder.where} must have the "
            f"shapes (rank * {count}, {math.prod(in_)}) and ({math.prod(out)}, rank * {count}) for "
            f"{str(place)!r}, or those of its other side: got {first} and {second}"
        )
    side = _usual(folder, place) if len(sides) > 1 else sides[0]
    first, second = (folder.file[own[kind].name] for kind in "AB")
    rank = len(first) // count
    a = first.reshape(count, rank, -1)
    b = np.moveaxis(second.reshape(-1, rank, count), -1, 0)
    a, b = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if side == "in" else (b, a)
    return a.reshape(*stack, *in_, rank), b.reshape(*stack, rank, *out)


def _sides(folder: Folder, own: Keys, place: Place) -> list[Side]:
    """Return on which sides of the weight ``A`` can be, by the shapes of its tensors."""
    _, shape = folder.box(place)
    if (roles := folder.roles(place)) is None:
        return []
    sizes = of_experts(roles, shape).sizes(shape)
    count, size_in, size_out = (math.prod(group) for group in sizes)
    first, second = (folder.file.shapes[own[kind].name] for kind in "AB")
    rank = first[0] // count if len(first) == 2 else 0

    def is_on(one: int, other: int) -> bool:
        return rank > 0 and (first, second) == ((rank * count, one), (other, rank * count))

    found: list[Side] = ["in"] if is_on(size_in, size_out) else []
    return [*found, "out"] if is_on(size_out, size_in) else found


def _usual(folder: Folder, place: Place) -> Side:
    """Return on which side of the weight ``A`` is in the version that wrote a folder."""
    version = folder.config.version
    if not version or version >= (0, 20):
        return "in"
    return "in" if version < (0, 19) and place.layout == "transposed" else "out"


def depths(modules: Sequence[Module]) -> dict[str, int]:
    """Return for each parameter in how many others of its module PEFT nests its factors."""
    found: dict[str, int] = {}
    counts: collections.Counter[str] = collections.Counter()
    for module in sorted(modules, key=lambda module: -module.place.order):
        owner = module.name.rpartition(".")[0]
        found[module.name] = counts[owner]
        counts[owner] += 1
    return found


def tensors(a: np.ndarray, b: np.ndarray, module: Module) -> tuple[np.ndarray, np.ndarray]:
    """Return the tensors of the factors of a parameter; the opposite of `factors`."""
    count, rank = module.entries, module.rank
    a, b = a.reshape(count, -1, rank), b.reshape(count, rank, -1)
    first = a.swapaxes(1, 2).reshape(count * rank, -1)
    return first, b.transpose(2, 1, 0).reshape(-1, rank * count)
