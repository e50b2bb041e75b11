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

from jaxlora.formats.factors import Factors, Tensors
from jaxlora.formats.modules import Module
from jaxlora.formats.names.mapping import Place
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft.folder import Folder, ModuleKey
from jaxlora.weights.roles import Roles

Side = Literal["in", "out"]


def parameters(folder: Folder, modules: Mapping[ModuleKey, Tensors]) -> dict[ModuleKey, str]:
    """Return by module and depth the parameter that its factors are for.

    Raises:
        ValueError: the file has other factors than the config names parameters.
    """
    targets = folder.config.get("target_parameters", ())
    meant: dict[str, list[str]] = {}
    for name in folder.table:
        if configs.named(name, targets):
            meant.setdefault(name.rpartition(".")[0], []).append(name)
    has = {suffix for own in meant.values() for name in own for suffix in configs.suffixes(name)}
    for target in targets:
        if target not in has:
            raise ValueError(
                f"target_parameters of {folder.where} name {target!r}, which no name of the tree is"
            )
    found: dict[ModuleKey, str] = {}
    for module, own in meant.items():
        depths = sorted((depth for other, depth in modules if other == module), reverse=True)
        if len(own) != len(depths):
            raise ValueError(
                f"{folder.where} must have a pair of factors for each of {own}: got {len(depths)}"
            )
        names = _in_order(folder, own, [modules[module, depth] for depth in depths])
        found |= {(module, d): name for d, name in zip(depths, names, strict=True)}
    return found


def _in_order(folder: Folder, names: list[str], pairs: list[Tensors]) -> Sequence[str]:
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

    is_told = len({places[name].order for name in names}) == len(names)
    for as_usual in (True, False):
        fitting = [o for o in itertools.permutations(names) if fits(o, as_usual=as_usual)]
        if len(fitting) > 1 and not is_told:
            _refuse_untold(names)
        if fitting:
            return fitting[0]
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
    folder: Folder, own: Tensors, place: Place, roles: Roles, shape: tuple[int, ...]
) -> Factors:
    """Return the factors ``(*stack, *in, rank)`` and ``(*stack, rank, *out)`` of a parameter."""
    stack, in_, out = roles.sizes(shape)
    count = math.prod(stack)
    if not (sides := _sides(folder, own, place)):
        first, second = (folder.file.shapes[own[kind]] for kind in "AB")
        raise ValueError(
            f"the tensors {own['A']!r} and {own['B']!r} of {folder.where} must have the "
            f"shapes (rank * {count}, {math.prod(in_)}) and ({math.prod(out)}, rank * {count}) for "
            f"{str(place)!r}, or those of its other side: got {first} and {second}"
        )
    side = _usual(folder, place) if len(sides) > 1 else sides[0]
    first, second = (folder.file[own[kind]] for kind in "AB")
    rank = len(first) // count
    a = first.reshape(count, rank, -1)
    b = np.moveaxis(second.reshape(-1, rank, count), -1, 0)
    a, b = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if side == "in" else (b, a)
    return Factors(a.reshape(*stack, *in_, rank), b.reshape(*stack, rank, *out), rank)


def _sides(folder: Folder, own: Tensors, place: Place) -> list[Side]:
    """Return on which sides of the weight ``A`` can be, by the shapes of its tensors."""
    _, shape = folder.box(place)
    if (known := folder.arrangement(place)) is None:
        return []
    sizes = of_experts(known.roles, shape).sizes(shape)
    count, size_in, size_out = (math.prod(group) for group in sizes)
    first, second = (folder.file.shapes[own[kind]] for kind in "AB")
    rank = first[0] // count if len(first) == 2 else 0

    def is_on(one: int, other: int) -> bool:
        return rank > 0 and (first, second) == ((rank * count, one), (other, rank * count))

    found: list[Side] = ["in"] if is_on(size_in, size_out) else []
    return [*found, "out"] if is_on(size_out, size_in) else found


def _usual(folder: Folder, place: Place) -> Side:
    """Return on which side of the weight ``A`` is in the version that wrote a folder."""
    version = folder.config.version
    if version >= (0, 20):  # up to 0.17 a config does not tell the version
        return "in"
    return "in" if version < (0, 19) and place.layout == "transposed" else "out"


def depths(modules: Sequence[Module]) -> dict[str, int]:
    """Return for each parameter in how many others of its module PEFT nests its factors."""
    found: dict[str, int] = {}
    counts: collections.Counter[str] = collections.Counter()
    orders = collections.Counter((m.name.rpartition(".")[0], m.place.order) for m in modules)
    for (owner, _), count in orders.items():
        if not owner:
            raise ValueError(
                f"a parameter of experts needs the name of its module before its own, with a dot: "
                f"got {[m.name for m in modules]}"
            )
        if count > 1:
            _refuse_untold([m.name for m in modules if m.name.rpartition(".")[0] == owner])
    for module in sorted(modules, key=lambda module: -module.place.order):
        owner = module.name.rpartition(".")[0]
        found[module.name] = counts[owner]
        counts[owner] += 1
    return found


def _refuse_untold(names: list[str]) -> None:
    raise ValueError(
        f"the order of {names} in their module is not told: give names a pair for each of them, in "
        "the order in which the module has them"
    )


def tensors(module: Module) -> tuple[np.ndarray, np.ndarray]:
    """Return the tensors of the factors of a parameter; the opposite of `factors`."""
    a, b = module.factors()
    count, rank = module.entries, module.rank
    a, b = a.reshape(count, -1, rank), b.reshape(count, rank, -1)
    first = a.swapaxes(1, 2).reshape(count * rank, -1)
    return first, b.transpose(2, 1, 0).reshape(-1, rank * count)
