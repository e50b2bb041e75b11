"""The factors of a PEFT folder, as pieces of adapters."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from jaxlora.formats.layouts import Arrangement, check_untied
from jaxlora.formats.names import Place
from jaxlora.formats.peft import experts
from jaxlora.formats.peft.folder import Folder, ModuleKey
from jaxlora.formats.peft.keys import Key
from jaxlora.formats.pieces import Piece
from jaxlora.weights import blocks


def read(folder: Folder, modules: Mapping[ModuleKey, Mapping[str, Key]]) -> Iterator[Piece]:
    """Return the factors of every module.

    Raises:
        ValueError: one lacks a part, or does not fit its place or the config.
    """
    of_parameters = experts.parameters(folder, modules)
    for module, own in modules.items():
        yield _piece(folder, of_parameters.get(module, module[0]), own, module in of_parameters)


def _piece(folder: Folder, name: str, own: Mapping[str, Key], is_parameter: bool) -> Piece:
    """Return the factors of a module, or of a parameter for experts, and its magnitude."""
    place = folder.place(name, own["A"])
    if (found := folder.arrangement(place)) is None:
        why = folder.sites.skipped.get(place.path, "it is no weight")
        raise ValueError(
            f"the leaf {place.path!r}, for which {folder.where} has {own['A'].name!r}, cannot be "
            f"adapted: {why}"
        )
    if place.layout == "embedding":
        check_untied(folder.sites, place, folder.where)
    box, shape = folder.box(place)
    roles = experts.of_experts(found.roles, shape) if is_parameter else found.roles
    if is_parameter:
        a, b = experts.factors(folder, own, place, roles, shape)
    else:
        a, b = _of_module(folder, own, place, found, shape)
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
        if not blocks.has_entries(place.part, roles.stack):
            raise ValueError(
                f"the magnitude {own['magnitude'].name!r} of {folder.where} must be of a whole "
                f"leaf or of entries of its stack: got {str(place)!r}"
            )
        magnitude = folder.flat(own["magnitude"], place, (*stack, *out))
    alpha = config.plain_alpha(name, rank)
    return Piece(place.path, box, roles, folder.whole(place), alpha, a, b, magnitude)


def _of_module(
    folder: Folder,
    own: Mapping[str, Key],
    place: Place,
    found: Arrangement,
    shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of a module, ``(*stack, ...)`` of one entry."""
    stack, in_, out = found.roles.sizes(shape)
    if math.prod(stack) != 1:
        raise ValueError(
            f"the place of {own['A'].module!r}, {str(place)!r}, must be one entry of its stack: "
            f"got {math.prod(stack)} of them; write an index behind the path in the names"
        )
    rank = (folder.file.shapes[own["A"].name] or (0,))[0]
    needed = found.factor_shapes(shape, rank)
    first, second = (
        folder.tensor(own[kind], place, one) for kind, one in zip("AB", needed, strict=True)
    )
    a, b = found.factors(first, second, shape)
    return a.reshape(*stack, *in_, rank), b.reshape(*stack, rank, *out)
