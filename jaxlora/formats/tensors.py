"""Files of tensors in the format of safetensors, which is checked before anything is read."""

import collections
import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxlora.messages import checks

DTYPES = MappingProxyType(  # what files call each dtype, by its name, in the order they have them
    {
        **{"uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64"},
        **{"float32": "F32", "uint32": "U32", "int32": "I32"},
        **{"bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16"},
        **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
        **{"int8": "I8", "uint8": "U8", "bool": "BOOL"},
    }
)
_NAMES = MappingProxyType({code: name for name, code in DTYPES.items()})


class TensorFile:
    """The tensors of a file that is open.

    Each is a view of the file, which is read when the tensor is. What is kept is a copy.

    Attributes:
        path: the file.
        shapes: shape of each tensor by name.
        metadata: what its header says beside them.
    """

    def __init__(self, path: Path, opened: Any, file: BinaryIO):
        self.path, self._data = path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 + int.from_bytes(self._data[:8], "little")
        self._header = _header(path, self._data[8 : self._start])
        self.metadata: dict[str, str] = opened.metadata() or {}
        self.shapes = {name: tuple(self._header[name]["shape"]) for name in opened.keys()}  # noqa: SIM118 - it is no mapping

    def __getitem__(self, name: str) -> np.ndarray:
        start = self._start + self._header[name]["data_offsets"][0]
        return np.ndarray(self.shapes[name], self.dtype(name), self._data, start)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor, which is not read."""
        kind = self._header[name]["dtype"]
        if kind not in _NAMES:
            raise ValueError(
                f"the tensor {name!r} of {str(self.path)!r} has the dtype {kind}, which is not read"
            )
        return jnp.dtype(_NAMES[kind])


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Open a file of tensors.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        ImportError: safetensors is not installed.
        PermissionError: it may not be read.
        ValueError: it is no whole file of tensors, or has two of one name.
    """
    path = Path(path)
    library = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with open(path, "rb") as file:  # which says so where it may not be read
        try:
            opened = library.safe_open(path, "np")
        except library.SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no whole file of safetensors: {error}") from error
        with opened as reader:
            yield TensorFile(path, reader, file)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    """Return what a header says, or raise where two tensors have one name."""

    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            (name, count), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{str(path)!r} has {count} entries named {checks.shown(name)}")
        return found

    return json.loads(text, object_pairs_hook=once)


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("files of tensors need safetensors: install jaxlora[formats]") from error
    return safetensors
