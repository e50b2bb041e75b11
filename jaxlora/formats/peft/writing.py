"""Write a folder that PEFT loads an adapter from."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlora.formats import arguments, tensors
from jaxlora.formats.layouts import Arrangement, arrangement
from jaxlora.formats.modules import Module, modules
from jaxlora.formats.names import Names
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft import experts, kept
from jaxlora.formats.peft.config import CONFIG_FILE
from jaxlora.formats.peft.keys import PREFIX
from jaxlora.formats.peft.reading import TENSORS_FILE
from jaxlora.messages import checks
from jaxlora.storage import processes, replacing
from jaxlora.storage.processes import together
from jaxlora.targets.sites import Sites
from jaxlora.tracing.recorder import Kind
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
    arguments.check_names(names)
    arguments.check_sites(sites, may_be_none=True)
    if not isinstance(base_model_name_or_path, str | None):
        raise TypeError(
            "base_model_name_or_path must be a string or None: "
            f"got {checks.shown(base_model_name_or_path)}"
        )
    target = arguments.local(folder)
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
    for name, term in own.items():
        if term.changed:
            raise ValueError(
                f"the adapter {name!r} started with {term.changed!r}, which changed its base: make "
                "it one of the base as it was, with jaxlora.algebra.rebase"
            )
    found, values = [*modules(own, names)], [*kept.kept(others, names, sites)]
    kept.check_whole(values, sites, names)
    adapted = {module.name for module in found}
    about = {**_config(found), **kept.config(values, adapted), "peft_version": _VERSION}
    if sites is not None:
        about |= _excluded(found, names.table(sites.shapes))
    result: dict[str, np.ndarray] = {}
    replaced = ((value.key(adapted), value.value) for value in values)
    for name, array in (*_factors(found, sites), *replaced):
        if name in result:
            raise ValueError(f"two things have the name {name!r} in the file")
        result[name] = array
    return about, {PREFIX + name: array for name, array in result.items()}


def _excluded(found: list[Module], names: Iterable[str]) -> Json:
    """Return what a config says of modules that are not adapted and end as one that is."""
    adapted = {module.name for module in found}
    others = {
        name
        for name in names
        if name not in adapted and not adapted.isdisjoint(configs.suffixes(name))
    }
    return {"exclude_modules": sorted(others)} if others else {}


def _arranged(module: Module, sites: Sites | None) -> Arrangement:
    """Return how the weight of a module lies, or raise if its adapter does not travel."""
    place, shape = module.place, module.first.shape
    if sites is None:
        if place.layout == "conv":
            raise ValueError(
                f"{str(place)!r} is a kernel, and only the program tells which of its axes are the "
                "window: give sites=jaxlora.find_sites(fn, params, *args)"
            )
        return Arrangement(module.roles, place.layout)
    found = arrangement(sites, place, shape)
    uses = {use.kind for use in sites[place.path].uses} if found else set()
    if found is None or (uses == {Kind.LOOKED_UP}) != (place.layout == "embedding"):
        raise ValueError(
            f"the layout of {str(place)!r} must be 'embedding' if and only if the program looks "
            f"rows of it up: got {place.layout!r}"
        )
    return dataclasses.replace(found, roles=module.roles)


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


def _factors(found: list[Module], sites: Sites | None) -> Iterator[tuple[str, np.ndarray]]:
    """Return the tensors of modules with factors, by name."""
    depths = experts.depths([module for module in found if module.entries > 1])
    for module in found:
        a, b = module.factors()
        name, layout = module.name, module.place.layout
        how = _arranged(module, sites)
        if module.entries > 1:
            name = module.name.rpartition(".")[0] + ".base_layer" * depths[module.name]
            first, second = experts.tensors(a, b, module)
        else:
            stack = len(module.roles.stack)
            a, b = a.reshape(a.shape[stack:]), b.reshape(b.shape[stack:])
            first, second = how.tensors(a, b, module.shape)
        kind = "lora_embedding_{}" if layout == "embedding" else "lora_{}.weight"
        yield f"{name}.{kind.format('A')}", first
        yield f"{name}.{kind.format('B')}", second
        if (magnitude := module.magnitude()) is not None:
            window = (1,) * (first.ndim - 2)
            shape = (1, -1, *window) if layout == "conv" else (-1,)
            yield f"{name}.lora_magnitude_vector", magnitude.reshape(shape)
