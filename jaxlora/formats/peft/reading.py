"""Read a folder that PEFT saved an adapter to."""

import os
from collections.abc import Iterable

import numpy as np

from jaxlora.formats import arguments, pieces, tensors
from jaxlora.formats.names import Names
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft import factors, values
from jaxlora.formats.peft.folder import Folder
from jaxlora.messages import checks
from jaxlora.storage import directories
from jaxlora.targets.sites import Sites
from jaxlora.types import Leaf
from jaxlora.weights import blocks
from jaxlora.weights.adapters import Adapter, Adapters

TENSORS_FILE = "adapter_model.safetensors"


def load(folder: str | os.PathLike[str], *, sites: Sites, names: Names) -> Adapters:
    """Return the adapters that PEFT saved to a folder.

    Every tensor of the folder is used, and every target of its config has tensors; anything else
    is an error. The factors keep the dtype of the file. Dropout is no part of adapters.

    Args:
        folder: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        sites: where adapters can go in the tree that they are for, from `jaxlora.find_sites`.
        names: which modules of the file are which leaves of the tree.

    Returns:
        Adapters by path, for `jaxlora.bind`; and for modules that PEFT saved whole, biases and
        tokens, replacements. The entries of a stack that have one rank and alpha are one adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: safetensors is not installed.
        TypeError: sites or names are none.
        ValueError: a file is damaged; the config says what adapters here cannot; a tensor is not
            understood, has no place, another shape than its place needs, or is missing.
    """
    arguments.check_sites(sites)
    arguments.check_names(names)
    place = directories.standing(arguments.local(folder))
    config, path = configs.read(place), place / TENSORS_FILE
    pickled = path.with_suffix(".bin")
    if pickled.is_file() and not path.is_file():
        raise ValueError(
            f"{str(pickled)!r} is a pickle, which can run any code when it is read: load it with "
            f"PEFT and save it again, with save_pretrained(folder), as {TENSORS_FILE!r}"
        )
    table = names.table(sites.shapes)
    with tensors.opened(path) as file:
        return _adapters(Folder(config, file, sites, table))


def _adapters(folder: Folder) -> Adapters:
    """Return what a folder has."""
    modules, kept, tokens = folder.keys()
    adapted = {module for module, _ in modules}
    _check_targets(folder, adapted)
    found: Adapters = {**pieces.adapters(factors.read(folder, modules))}
    others = (*values.read(folder, kept, adapted), *values.read_tokens(folder, tokens))
    for path, replacement in others:
        if any(blocks.parse(name)[0] == path for name in found):
            raise ValueError(
                f"{folder.where} adapts {path!r} and has values or rows in its place: it can have "
                "one of them"
            )
        found[path] = replacement
    if not any(map(_changes, found.values())):
        checks.warn(
            f"the adapters of {folder.where} change nothing: all their products are 0", UserWarning
        )
    return found


def _changes(term: Leaf) -> bool:
    """Tell whether something trained changes what it is of."""
    is_product = isinstance(term, Adapter) and term.magnitude is None
    return not is_product or bool(np.any(term.a) and np.any(term.b))


def _check_targets(folder: Folder, adapted: Iterable[str]) -> None:
    """Raise if the modules with factors are not those that the config means."""
    config, where = folder.config, folder.where
    parameters = {
        name for name in folder.table if configs.named(name, config.get("target_parameters", ()))
    }
    modules = {*adapted} - {name.rpartition(".")[0] for name in parameters}
    inner = {m for m in modules if m.rpartition(".")[0] in modules}  # of MultiheadAttention
    if strange := sorted(module for module in modules - inner if not config.means(module)):
        raise ValueError(
            f"{where} has factors of modules that its config does not name: {_listed(strange)}"
        )
    targets = config.get("target_modules", ())
    has = {suffix for module in modules for suffix in configs.suffixes(module)}
    if isinstance(targets, str):
        unmet = [] if any(configs.named(module, targets) for module in modules) else [targets]
    else:
        unmet = [target for target in targets if target not in has]
    for target in unmet:
        raise ValueError(f"{where} has no factors for the target {target!r} of its config")
    wanted = {
        name
        for name, place in folder.table.items()
        if place.path in folder.sites and name not in parameters and config.means(name)
    }
    if lost := sorted(wanted - modules):
        raise ValueError(
            f"{where} has no factors of modules that its config names: {_listed(lost)}"
        )


def _listed(names: list[str]) -> str:
    """Return names for an error, not more than five of them."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
