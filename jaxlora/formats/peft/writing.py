"""Write a folder that PEFT loads an adapter from."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlora.formats import arguments, streaming
from jaxlora.formats.modules import Module, arranged, check_written, modules, norms
from jaxlora.formats.names.mapping import Names
from jaxlora.formats.peft import experts, kept, plain
from jaxlora.formats.peft.config import CONFIG_FILE
from jaxlora.formats.peft.keys import PREFIX
from jaxlora.formats.peft.reading import TENSORS_FILE
from jaxlora.messages import checks
from jaxlora.storage import processes, replacing
from jaxlora.targets.sites import Sites
from jaxlora.types import Json
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
        TypeError: an argument is of the wrong kind, or adapters are traced by JAX.
        ValueError: an adapter has no name in the file, or says what PEFT cannot.
        OSError: it cannot be written.
    """
    if not isinstance(base_model_name_or_path, str | None):
        raise TypeError(
            "base_model_name_or_path must be a string or None: "
            f"got {checks.shown(base_model_name_or_path)}"
        )
    said = {"base_model_name_or_path": base_model_name_or_path}
    save_saying(folder, adapters, said, names=names, sites=sites)


def save_saying(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    said: Json,
    *,
    names: Names,
    sites: Sites | None,
) -> None:
    """Write adapters as `save` does, with a config that says some keys as they are given."""
    arguments.check_saved("peft.save", adapters, names, sites)
    target = arguments.local(folder)
    adapters = {path: jax.tree.map(processes.whole, term) for path, term in adapters.items()}
    about, found = _contents(adapters, names, sites)
    about |= said

    def write(place: Path) -> None:
        place.mkdir()
        streaming.write_arrays(place / TENSORS_FILE, found, streaming.PYTORCH)
        (place / CONFIG_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")

    replacing.replace_from_first(
        "peft.save",
        target,
        write,
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
    check_written(own)
    found, values = [*modules(own, names)], [*kept.kept(others, names, sites)]
    kept.check_whole(values, sites, names)
    adapted = {module.name for module in found}
    about = {**plain.config(found), **kept.config(values, adapted), "peft_version": _VERSION}
    if sites is not None:
        about |= plain.excluded(found, names.table(sites.shapes))
    result: dict[str, np.ndarray] = {}
    replaced = ((value.key(adapted), value.value) for value in values)
    for name, array in (*_factors(found, sites), *replaced):
        if name in result:
            raise ValueError(f"two things have the name {name!r} in the file")
        result[name] = array
    return about, {PREFIX + name: array for name, array in result.items()}


def _factors(found: list[Module], sites: Sites | None) -> Iterator[tuple[str, np.ndarray]]:
    """Return the tensors of modules with factors, by name."""
    depths = experts.depths([module for module in found if module.entries > 1])
    within = plain.inner(found)
    for module in found:
        name, layout = module.name, module.place.layout
        how = arranged(module, sites)
        if module.entries > 1:
            name = module.name.rpartition(".")[0] + ".base_layer" * depths[module.name]
            first, second = experts.tensors(module)
        else:
            first, second = module.tensors(how)
        if name in within:
            owner = within[name]
            scale = module.alpha / (plain.INNER_COUNT * owner.alpha)  # of the same rank
            second = second if scale == 1 else (second * scale).astype(second.dtype)
            name = f"{owner.name}.base_layer{name.removeprefix(owner.name)}"
        kind = "lora_embedding_{}" if layout == "embedding" else "lora_{}.weight"
        yield f"{name}.{kind.format('A')}", first
        yield f"{name}.{kind.format('B')}", second
        if (magnitude := norms(module, first)) is not None:
            yield f"{name}.lora_magnitude_vector", magnitude
