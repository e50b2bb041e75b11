"""Write a folder that PEFT loads an adapter from."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlora.formats import layouts, tensors
from jaxlora.formats.names import Names
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft import experts, kept
from jaxlora.formats.peft.config import CONFIG_FILE
from jaxlora.formats.peft.factors import check_untied
from jaxlora.formats.peft.keys import PREFIX
from jaxlora.formats.peft.modules import Module, modules
from jaxlora.formats.peft.reading import TENSORS_FILE
from jaxlora.messages import checks
from jaxlora.storage import locations, processes, replacing
from jaxlora.storage.processes import together
from jaxlora.targets.sites import Sites
from jaxlora.types import Json
from jaxlora.weights import tree_checks
from jaxlora.weights.adapters import Adapter, Adapters, Replacement

_VERSION = "0.21.2"  # of PEFT, whose layout this is


def save(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    *,
    names: Names,
    base_model_name_or_path: str | None = None,
    sites: Sites | None = None,
) -> None:
    """Write adapters to a folder that PEFT loads.

    The folder is there whole, or what was there before is as it was. Adapters of several parts of
    one module are written as the one that equals them, of the sum of their ranks.

    Args:
        folder: a folder that is not there, is empty, or holds nothing but an earlier save.
        adapters: adapters by path, as of `jaxlora.split`; arrays that are spread over devices or
            processes are gathered. Every process calls it.
        names: which modules of the file are which leaves of the tree.
        base_model_name_or_path: what PEFT loads the base from, for its config.
        sites: where adapters can go, from `jaxlora.find_sites`. It is needed if a weight of two or
            more axes is replaced as a whole, for only the program tells how it lies; with it an
            adapted embedding that is also a head is refused, which PEFT would adapt at one of them.

    Raises:
        FileExistsError: the folder holds something else.
        ImportError: safetensors is not installed.
        TypeError: an argument is of the wrong kind, or adapters are traced by JAX.
        ValueError: an adapter has no name in the file, or says what PEFT cannot.
        OSError: it cannot be written.
    """
    tree_checks.check_adapters(adapters, some=True)
    tree_checks.check_untraced("peft.save", dict(adapters))
    if not isinstance(names, Names):
        raise TypeError(f"names must be a jaxlora.formats.Names: got {checks.shown(names)}")
    if not isinstance(base_model_name_or_path, str | None):
        raise TypeError(
            "base_model_name_or_path must be a string or None: "
            f"got {checks.shown(base_model_name_or_path)}"
        )
    if not isinstance(sites, Sites | None):
        raise TypeError(
            f"sites must be from jaxlora.find_sites, or None: got {checks.shown(sites)}"
        )
    target = locations.resolve(folder)
    if not locations.is_local(target):
        raise ValueError(f"folder must be a local path: got {str(target)!r}")
    adapters = {path: jax.tree.map(processes.whole, term) for path, term in adapters.items()}
    about, found = _contents(adapters, names, sites)
    about["base_model_name_or_path"] = base_model_name_or_path

    def write(place: Path) -> None:
        place.mkdir()
        tensors.write(place / TENSORS_FILE, found, {"format": "pt"})
        (place / CONFIG_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")

    def save_there(place: Path) -> None:
        def written():
            replacing.with_path(target, lambda: write(place))

        together("peft.save", written, first_alone=True)

    replacing.replace(
        "peft.save",
        target,
        save_there,
        lambda place: replacing.check_free(place, target, {CONFIG_FILE, TENSORS_FILE}.__contains__),
    )


def _contents(
    adapters: Adapters, names: Names, sites: Sites | None
) -> tuple[Json, dict[str, np.ndarray]]:
    """Return the config and the tensors of a folder."""
    own = {name: term for name, term in adapters.items() if isinstance(term, Adapter)}
    others = {name: term for name, term in adapters.items() if isinstance(term, Replacement)}
    if not own:
        raise ValueError("adapters must have factors, without which PEFT has no config: got none")
    found, values = [*modules(own, names)], [*kept.kept(others, names, sites)]
    if sites is not None:
        for module in found:
            check_untied(sites, module.place, "its folder")
    adapted = {module.name for module in found}
    about = {**_config(found), **kept.config(values, adapted), "peft_version": _VERSION}
    result: dict[str, np.ndarray] = {}
    for name, array in (*_factors(found), *kept.tensors(values, adapted)):
        if name in result:
            raise ValueError(f"two things have the name {name!r} in the file")
        result[name] = array
    return about, {PREFIX + name: array for name, array in result.items()}


def _config(found: list[Module]) -> Json:
    """Return what the config says of modules with factors."""
    has = {module.first.magnitude is not None: module.name for module in found}
    if len(has) == 2:
        raise ValueError(
            f"all adapters must have a magnitude, or none, for PEFT: {has[True]!r} has one, "
            f"{has[False]!r} has none"
        )
    about = configs.plain((module.name, module.rank, module.alpha) for module in found)
    of_parameters = {module.name for module in found if module.entries > 1}
    about["target_modules"] = [x for x in about["target_modules"] if x not in of_parameters]
    if of_parameters:
        about["target_parameters"] = sorted(of_parameters)
    return about | {"use_dora": True in has}


def _factors(found: list[Module]) -> Iterator[tuple[str, np.ndarray]]:
    """Return the tensors of modules with factors, by name."""
    depths = experts.depths([module for module in found if module.entries > 1])
    for module in found:
        a, b = module.factors()
        name, layout = module.name, module.place.layout
        if module.entries > 1:
            name = module.name.rpartition(".")[0] + ".base_layer" * depths[module.name]
            first, second = experts.tensors(a, b, module)
        else:
            stack = len(module.roles.stack)
            a, b = a.reshape(a.shape[stack:]), b.reshape(b.shape[stack:])
            first, second = layouts.tensors(a, b, module.roles, module.shape, layout)
        kind = "lora_embedding_{}" if layout == "embedding" else "lora_{}.weight"
        yield f"{name}.{kind.format('A')}", first
        yield f"{name}.{kind.format('B')}", second
        if (magnitude := module.magnitude()) is not None:
            window = (1,) * (first.ndim - 2)
            shape = (1, -1, *window) if layout == "conv" else (-1,)
            yield f"{name}.lora_magnitude_vector", magnitude.reshape(shape)
