"""The factors of a PEFT folder, as pieces of adapters."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxlora.formats import layouts
from jaxlora.formats.names import Place
from jaxlora.formats.peft import experts
from jaxlora.formats.peft.folder import Folder, Module
from jaxlora.formats.peft.keys import Key
from jaxlora.formats.pieces import Piece
from jaxlora.targets.sites import Sites
from jaxlora.tracing.recorder import Kind
from jaxlora.weights.roles import Roles


def read(folder: Folder, modules: Mapping[Module, Mapping[str, Key]]) -> Iterator[Piece]:
    """Return the factors of every module.

    Raises:
        ValueError: one lacks a part, or does not fit its place or the config.
    """
    of_parameters = experts.parameters(folder, modules)
    for module, own in modules.items():
        for kind, other in (("A", "B"), ("B", "A"), ("magnitude", "A")):
            if kind in own and other not in own:
                raise ValueError(
                    f"{folder.where} has {own[kind].name!r}, and no tensor {other} beside it"
                )
        yield _piece(folder, of_parameters.get(module, module[0]), own, module in of_parameters)


def _piece(folder: Folder, name: str, own: Mapping[str, Key], is_parameter: bool) -> Piece:
    """Return the factors of a module, or of a parameter for experts, and its magnitude."""
    place = folder.place(name, own["A"])
    if (roles := folder.roles(place)) is None:
        why = folder.sites.skipped.get(place.path, "it is no weight")
        raise ValueError(
            f"the leaf {place.path!r}, for which {folder.where} has {own['A'].name!r}, cannot be "
            f"adapted: {why}"
        )
    check_untied(folder.sites, place, folder.where)
    box, shape = folder.box(place)
    roles = experts.of_experts(roles, shape) if is_parameter else roles
    make = experts.factors if is_parameter else _of_module
    a, b = make(folder, own, place, roles, shape)
    rank, config = a.shape[-1], folder.config
    if rank != config.rank(name):
        raise ValueError(
            f"the rank of {name!r} must be {config.rank(name)}, as its config says: got {rank} in "
            f"{own['A'].name!r} of {folder.where}"
        )
    if ("magnitude" in own) != config.get("use_dora", False):
        raise ValueError(
            f"use_dora of a config must say whether there are magnitudes: got "
            f"{config.get('use_dora', False)}, and {folder.where} has "
            f"{'one' if 'magnitude' in own else 'none'} for {name!r}"
        )
    stack, _, out = roles.sizes(shape)
    magnitude = None
    if "magnitude" in own:
        magnitude = folder.flat(own["magnitude"], place, (*stack, *out))
    alpha = config.plain_alpha(name, rank)
    return Piece(place.path, box, roles, folder.whole(place), alpha, a, b, magnitude)


def _of_module(
    folder: Folder,
    own: Mapping[str, Key],
    place: Place,
    roles: Roles,
    shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of a module, ``(*stack, ...)`` of one entry."""
    stack, in_, out = roles.sizes(shape)
    if math.prod(stack) != 1:
        raise ValueError(
            f"the place of {own['A'].module!r}, {str(place)!r}, must be one entry of its stack: "
            f"got {math.prod(stack)} of them; write an index behind the path in the names"
        )
    rank = (folder.file.shapes[own["A"].name] or (0,))[0]
    needed = layouts.factor_shapes(roles, shape, rank, place.layout)
    first, second = (
        folder.tensor(own[kind], place, shape) for kind, shape in zip("AB", needed, strict=True)
    )
    a, b = layouts.factors(first, second, roles, shape, place.layout)
    return a.reshape(*stack, *in_, rank), b.reshape(*stack, rank, *out)


def check_untied(sites: Sites, place: Place, where: str) -> None:
    """Raise if PEFT does not do the same to an embedding that is multiplied too, as a tied head."""
    if place.layout != "embedding" or place.path not in sites:
        return
    kinds = {use.kind for use in sites[place.path].uses}
    if {Kind.LOOKED_UP, Kind.CONTRACTED} <= kinds:
        raise ValueError(
            f"the leaf {place.path!r} is looked up and multiplied, and PEFT adapts an embedding "
            f"where it is looked up alone, for {where}: a leaf for each of the two is needed"
        )
