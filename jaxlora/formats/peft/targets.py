"""Whether the modules of a PEFT file with factors are those that its config names."""

import math
from collections.abc import Iterable

from jaxlora.formats.names.mapping import Place
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft.config import Config
from jaxlora.formats.source import Source


def check(source: Source, config: Config, adapted: Iterable[str]) -> None:
    """Raise if the modules with factors are not those that the config means.

    Args:
        source: the file.
        config: its config.
        adapted: names of the modules that have factors.
    """
    where = source.where
    parameters = {
        name for name in source.table if configs.named(name, config.get("target_parameters", ()))
    }
    modules = {*adapted} - {name.rpartition(".")[0] for name in parameters}
    inner = {m for m in modules if m.rpartition(".")[0] in modules}  # of MultiheadAttention
    meant = {name for name in {*source.table, *modules} if config.means(name)}
    if strange := sorted(modules - inner - meant):
        raise ValueError(
            f"{where} has factors of modules that its config does not name: {_listed(strange)}"
        )
    wanted = {
        name
        for name, place in source.table.items()
        if name not in parameters and name in meant and _is_module(source, place)
    }
    if lost := sorted(wanted - modules):
        raise ValueError(
            f"{where} has no factors of modules that its config names: {_listed(lost)}"
        )


def _is_module(source: Source, place: Place) -> bool:
    """Tell whether a place is the weight of a module, and no parameter for several experts."""
    if place.path not in source.sites:
        return False
    _, shape = source.box(place)
    return math.prod(source.sites[place.path].roles.sizes(shape)[0]) == 1


def check_met(where: str, config: Config, modules: Iterable[str]) -> None:
    """Raise if a target of the config has no modules with factors."""
    targets = config.get("target_modules", ())
    has = {suffix for module in modules for suffix in configs.suffixes(module)}
    if isinstance(targets, str):
        unmet = [] if any(configs.named(module, targets) for module in modules) else [targets]
    else:
        unmet = [target for target in targets if target not in has]
    for target in unmet:
        raise ValueError(f"{where} has no factors for the target {target!r} of its config")


def _listed(names: list[str]) -> str:
    """Return names for an error, not more than five of them."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
