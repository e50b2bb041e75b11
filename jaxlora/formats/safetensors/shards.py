"""Checkpoints of Hugging Face: one file of tensors, or several with an index beside them."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from jaxlora.formats import streaming, tensors
from jaxlora.formats.streaming import Rows
from jaxlora.formats.tensors import TensorFile
from jaxlora.messages import checks

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_of_checkpoint(file: str) -> bool:
    """Tell whether a file of this name is of a checkpoint."""
    return file == INDEX or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file) is not None


class Checkpoint:
    """The tensors of a checkpoint that is open, each read when it is asked for.

    Attributes:
        where: what is read, as errors name it.
        shapes: shape of each tensor by name.
    """

    def __init__(self, where: str, files: Mapping[str, TensorFile]):
        self.where, self._files = where, files
        self.shapes = {name: file.shapes[name] for name, file in files.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor, which is not read."""
        return self._files[name].dtype(name)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """Open a checkpoint: a file, an index, or a folder with one of them.

    Raises:
        FileNotFoundError: there is none, or a file that the index names is missing.
        ValueError: a file is damaged, or the index and the files differ.
    """
    if path.is_dir():
        path = path / INDEX if (path / INDEX).is_file() else path / FILE
    with contextlib.ExitStack() as stack:
        if path.suffix != ".json":
            file = stack.enter_context(tensors.opened(path))
            yield Checkpoint(repr(str(path)), dict.fromkeys(file.shapes, file))
            return
        by_name = _index(path)
        files = {
            name: stack.enter_context(tensors.opened(path.parent / name))
            for name in dict.fromkeys(by_name.values())
        }
        held = {name: file for file in files.values() for name in file.shapes}
        told = {name: files[file] for name, file in by_name.items()}
        if wrong := [name for name in {*held} | {*told} if held.get(name) is not told.get(name)]:
            raise ValueError(
                f"{str(path)!r} and its files must name the same tensors: they differ in "
                f"{checks.shown(min(wrong))}"
            )
        yield Checkpoint(repr(str(path)), told)


def _index(path: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        found = json.loads(path.read_text())["weight_map"]
        by_name = {str(name): str(file) for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no index of a checkpoint: {error!r}") from error
    for file in by_name.values():
        if Path(file).name != file:
            raise ValueError(f"{str(path)!r} must name files beside it: got {checks.shown(file)}")
    return by_name


def write(
    folder: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    make: Callable[[str], Iterable[Rows]],
    most: int,
) -> None:
    """Write a checkpoint, the tensors of one file after the other.

    Args:
        folder: an empty folder.
        shapes: shape and dtype of each tensor by name.
        make: yields the rows of a tensor, see `streaming.write`.
        most: bytes of one file, if no tensor is larger.
    """
    sizes = {name: x.size * x.dtype.itemsize for name, x in shapes.items()}
    parts: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if parts[-1] and held + size > most:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    files = [FILE]
    if len(parts) > 1:
        count = len(parts)
        files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, names in zip(files, parts, strict=True):
        streaming.write(folder / file, {name: shapes[name] for name in names}, make)
    if len(parts) > 1:
        by_name = {name: f for f, names in zip(files, parts, strict=True) for name in names}
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": by_name}
        (folder / INDEX).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
