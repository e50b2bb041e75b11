"""What a config of plain keys says of modules that are written: all that an older PEFT knows."""

import collections
from collections.abc import Iterable
from typing import TypeVar

from jaxlora.formats.modules import Module
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft.config import pinned
from jaxlora.types import Json

T = TypeVar("T")
INNER_COUNT = 2  # how often PEFT, up to 0.21 at least, adds the product of what is within another


def config(found: list[Module]) -> Json:
    """Return what the config says of modules with factors."""
    has = {module.first.magnitude is not None: module.name for module in found}
    if len(has) == 2:
        raise ValueError(
            f"all adapters must have a magnitude, or none, for PEFT: {has[True]!r} has one, "
            f"{has[False]!r} has none"
        )
    about = _of_ranks([(module.name, module.rank, module.alpha) for module in found])
    of_parameters = {module.name for module in found if module.entries > 1}
    others = of_parameters | inner(found).keys()
    about["target_modules"] = [x for x in about["target_modules"] if x not in others]
    if of_parameters:
        about["target_parameters"] = sorted(of_parameters)
    return about | {"use_dora": True in has}


def inner(found: list[Module]) -> dict[str, Module]:
    """Return the adapted module that each is within, as the output within ``MultiheadAttention``.

    Raises:
        ValueError: the two have different ranks, which PEFT gives both at once.
    """
    by_name = {module.name: module for module in found if module.entries == 1}
    within: dict[str, Module] = {}
    for name, module in by_name.items():
        if (owner := by_name.get(name.rpartition(".")[0])) is None:
            continue
        if owner.rank != module.rank:
            raise ValueError(
                f"PEFT adapts {name!r} with the rank of {owner.name!r}, which it is a part of: "
                f"{owner.rank}; got {module.rank}"
            )
        within[name] = owner
    return within


def excluded(found: list[Module], names: Iterable[str]) -> Json:
    """Return what a config says of modules that are not adapted and end as one that is."""
    adapted = {module.name for module in found}
    others = {
        name
        for name in names
        if name not in adapted and not adapted.isdisjoint(configs.suffixes(name))
    }
    return {"exclude_modules": sorted(others)} if others else {}


def _of_ranks(modules: list[tuple[str, int, float]]) -> Json:
    """Return a config of plain keys for modules, each with its rank and alpha."""
    rank = _most_common([rank for _, rank, _ in modules])
    alpha = _most_common([alpha for _, _, alpha in modules])
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [name for name, _, _ in modules],
        "rank_pattern": {pinned(name): r for name, r, _ in modules if r != rank},
        "alpha_pattern": {pinned(name): _number(a) for name, _, a in modules if a != alpha},
    }


def _most_common(values: list[T]) -> T:
    return collections.Counter(values).most_common(1)[0][0]


def _number(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)
