"""The factors of a PEFT folder, as pieces of adapters."""

import dataclasses
from collections.abc import Container, Iterator, Mapping
from types import MappingProxyType

from jaxlora.formats import factors
from jaxlora.formats.factors import Factors, Tensors
from jaxlora.formats.layouts import Arrangement
from jaxlora.formats.names.mapping import Place
from jaxlora.formats.peft import experts, projections
from jaxlora.formats.peft.folder import Folder, ModuleKey
from jaxlora.formats.peft.plain import INNER_COUNT
from jaxlora.formats.pieces import Piece

_FORMS = MappingProxyType(
    {
        "LORA": ("LoRA", "LoRA-XS"),
        "LOHA": ("LoHa", "LoHa with windows"),
        "ADALORA": ("AdaLoRA",),
        "VERA": ("VeRA",),
    }
)


def check_types(folder: Folder, modules: Mapping[ModuleKey, Tensors]) -> None:
    """Raise if the tensors of a module are no whole adapter, or not of the type of the config."""
    for own in modules.values():
        found = "VeRA" if projections.are_of(own) else factors.form(folder, own).name
        if found not in (usual := _FORMS[folder.config.kind]):
            raise ValueError(
                f"{folder.where} must have tensors of {' or '.join(usual)}, as the peft_type "
                f"{folder.config.kind!r} says: got {next(iter(own.values()))!r}, of {found}"
            )


def read(folder: Folder, modules: Mapping[ModuleKey, Tensors]) -> Iterator[Piece]:
    """Return the factors of every module.

    Raises:
        ValueError: one lacks a part, or does not fit its place or the config.
    """
    of_parameters = experts.parameters(folder, modules)
    for module, own in modules.items():
        name = of_parameters.get(module, module[0])
        if "E" in own and folder.config.rank(name) == 0:
            continue  # AdaLoRA has taken all of its rank
        owner = _owner(module, modules)
        piece = _piece(folder, name, owner or name, own, module in of_parameters)
        if owner is not None:
            piece = dataclasses.replace(piece, alpha=piece.alpha * INNER_COUNT)
        yield piece


def _owner(module: ModuleKey, modules: Container[ModuleKey]) -> str | None:
    """Return the adapted module that one is within, as the output of ``MultiheadAttention``."""
    owner = module[0].rpartition(".")[0]
    return owner if (owner, module[1] - 1) in modules else None


def _piece(folder: Folder, name: str, meant: str, own: Tensors, is_parameter: bool) -> Piece:
    """Return the factors of a module, or of a parameter for experts, and its magnitude.

    Args:
        folder: the folder.
        name: name of the module.
        meant: name of that for which its config says the rank.
        own: names of its tensors.
        is_parameter: whether it is a parameter for experts.
    """
    first = next(iter(own.values()))
    place = folder.place(name, first)
    how = factors.adaptable(folder, place, first)
    box, shape = folder.box(place)
    roles = experts.of_experts(how.roles, shape) if is_parameter else how.roles
    if is_parameter:
        found = experts.factors(folder, own, place, roles, shape)
    else:
        found = _of_module(folder, own, place, how)
    folder.config.check(meant, found.form_rank, "magnitude" in own, folder.where)
    magnitude = None
    if "magnitude" in own:
        magnitude = factors.magnitude(folder, own["magnitude"], place, roles)
    alpha = found.alpha(folder.config.plain_alpha(meant, found.form_rank))
    return Piece(place.path, box, roles, folder.whole(place), alpha, found.a, found.b, magnitude)


def _of_module(folder: Folder, own: Tensors, place: Place, how: Arrangement) -> Factors:
    if projections.are_of(own):
        return projections.read(folder, own, place, how)
    return factors.read(folder, own, place, how)
