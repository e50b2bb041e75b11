"""Read a folder that PEFT saved an adapter to."""

import os
from pathlib import Path

from jaxlora.formats import arguments, pieces, tensors
from jaxlora.formats.names.mapping import Names
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft import factors, targets, values
from jaxlora.formats.peft.folder import Folder
from jaxlora.targets.sites import Sites, check_sites
from jaxlora.weights import blocks
from jaxlora.weights.adapters import Adapters

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
    check_sites(sites)
    arguments.check_names(names)
    table = names.table(sites.shapes)

    def read(place: Path) -> Adapters:
        config = configs.read(place)
        with tensors.opened(tensors_path(place)) as file:
            return _adapters(Folder(file, sites, table, config))

    return arguments.read(folder, read, configs.CONFIG_FILE)


def tensors_path(place: Path) -> Path:
    """Return the path of the tensors of a folder, or raise if they are a pickle."""
    path = place / TENSORS_FILE
    pickled = path.with_suffix(".bin")
    if pickled.is_file() and not path.is_file():
        raise ValueError(
            f"{str(pickled)!r} is a pickle, which can run any code when it is read: load it with "
            f"PEFT and save it again, with save_pretrained(folder), as {TENSORS_FILE!r}"
        )
    return path


def _adapters(folder: Folder) -> Adapters:
    """Return what a folder has."""
    modules, kept, tokens = folder.keys()
    factors.check_types(folder, modules)
    adapted = {module for module, _ in modules}
    targets.check_met(folder.where, folder.config, adapted)
    targets.check(folder, folder.config, adapted)
    found: Adapters = {**pieces.adapters(factors.read(folder, modules))}
    others = (*values.read(folder, kept, adapted), *values.read_tokens(folder, tokens))
    for path, replacement in others:
        if any(blocks.parse(name)[0] == path for name in found):
            raise ValueError(
                f"{folder.where} adapts {path!r} and has values or rows in its place: it can have "
                "one of them"
            )
        found[path] = replacement
    return pieces.placed(found, folder.where)
