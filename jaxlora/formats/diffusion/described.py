"""The tree that a file of a diffusion model describes by itself, read without that model.

As in `jaxlora.formats.peft.described`: a module's tensors tell the sizes of its weight, and its
name gives a path. Names with underscores for dots stay as they are, in one part of the path.
"""

from pathlib import Path

from jaxlora.formats import arguments, tensors
from jaxlora.formats.diffusion import keys, reading
from jaxlora.formats.peft import keys as peft_keys
from jaxlora.formats.peft.described import Described, weight
from jaxlora.formats.source import Source
from jaxlora.storage.locations import PathLike
from jaxlora.targets.sites import Sites


def described(path: PathLike) -> tuple[Described, dict[str, str]]:
    """Return what a file tells of the tree that it is for, and its header.

    Args:
        path: a file as `jaxlora.formats.diffusion.load` takes it.

    Raises:
        FileNotFoundError: there is none.
        ImportError: safetensors is not installed.
        ValueError: it is damaged, or is no such file.
    """
    return arguments.read(path, _described, reading.FILE)


def _described(place: Path) -> tuple[Described, dict[str, str]]:
    with tensors.opened(reading.file_of(place)) as file:
        source = Source(file, Sites({}, {}, {}), {})
        modules: dict[str, dict[str, str]] = {}
        for tensor in file.shapes:
            if tensor.startswith(peft_keys.PREFIX):
                raise ValueError(
                    f"{source.where} is of PEFT, which tells alpha in another file: give the "
                    "folder with both"
                )
            module, kind = keys.parsed(tensor, source.where)
            source.add(modules.setdefault(module, {}), kind, tensor, module)
        found = {module: weight(source, own) for module, own in modules.items()}
        return Described(found, {}), dict(file.metadata)
