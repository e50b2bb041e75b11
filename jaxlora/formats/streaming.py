"""Write a file of safetensors, each tensor as it is made, so that not all of them are in memory.

The library of safetensors writes what is in memory. The format is a header in JSON behind its
length, which tells each tensor's dtype, shape and bytes, and then the bytes
(https://huggingface.co/docs/safetensors). Tensors lie where that library would put them.
"""

import collections
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Self

import jax
import numpy as np

from jaxlora.formats.tensors import DTYPES
from jaxlora.types import Json, Leaf

Shapes = Mapping[str, jax.ShapeDtypeStruct] | Mapping[str, np.ndarray]  # of each tensor by name
Rows = Callable[[], Leaf]  # returns some rows of a tensor, in any shape
PYTORCH = MappingProxyType({"format": "pt"})  # metadata of all files that PyTorch is to load


def write(path: Path, shapes: Shapes, make: Callable[[str], Iterable[Rows]]) -> None:
    """Write a file of tensors that are made some rows at a time, and wait until the disk has it.

    While rows are made, those before are written, and the disk takes what was.

    Args:
        path: the file.
        shapes: shape and dtype of each tensor by name, in the order in which they are made.
        make: yields the rows of a tensor, one after the other. What it yields is called where they
            are written, in another thread.

    Raises:
        ValueError: files have no name for a dtype.
        OSError: it cannot be written.
    """
    with _begun(path, shapes, PYTORCH) as file, _Worker() as disk, _Worker() as writer:

        def put(name: str, rows: Rows) -> None:
            file.append(name, rows())
            if disk.is_free:
                disk.start(file.sync)

        for name in shapes:
            for rows in make(name):
                writer.start(functools.partial(put, name, rows))
        writer.wait()
        disk.wait()
        file.sync()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file of arrays that are in memory.

    Args:
        path: the file.
        arrays: the tensors by name.
        metadata: what the header says beside them.

    Raises:
        ValueError: files have no name for a dtype.
        OSError: it cannot be written.
    """
    with _begun(path, arrays, metadata) as file:
        for name, array in arrays.items():
            file.append(name, array)


class _Worker:
    """A thread that does one thing after the other, and raises what went wrong in the next."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def is_free(self) -> bool:
        """Whether all that was started is done."""
        return self._last is None or self._last.done()

    def start(self, action: Callable[[], None]) -> None:
        """Wait for what was started before, and start an action."""
        self.wait()
        self._last = self._pool.submit(action)

    def wait(self) -> None:
        """Wait for what was started, and raise what went wrong."""
        if self._last is not None:
            self._last.result()


class _File:
    """A file whose header is written."""

    def __init__(self, file: BinaryIO, shapes: Shapes, metadata: Mapping[str, str]):
        self._file, self._header = file, _header(shapes)
        about = {"__metadata__": dict(metadata)} | self._header
        text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start, self._written = 8 + len(text), collections.Counter[str]()
        file.write(len(text).to_bytes(8, "little") + text)

    def append(self, name: str, rows: Leaf) -> None:
        """Write the next rows of a tensor where they belong."""
        dtype, (start, stop) = self._header[name]["dtype"], self._header[name]["data_offsets"]
        data, start = _bytes(rows), start + self._written[name]
        is_of_it = DTYPES[rows.dtype.name] == dtype and start + len(data) <= stop
        assert is_of_it, f"{name} is {self._header[name]}: got {rows.dtype}, {start} + {len(data)}"
        self._file.seek(self._start + start)
        self._file.write(data)
        self._written[name] += len(data)

    def check_whole(self) -> None:
        """Raise if a tensor has not all of its rows."""
        for name, told in self._header.items():
            start, stop = told["data_offsets"]
            assert self._written[name] == stop - start, f"{name} ends at {self._written[name]}"

    def sync(self) -> None:
        """Wait until the disk has what was written, and let the system use its memory again."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS and Windows
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _begun(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Iterator[_File]:
    with open(path, "wb") as file:
        begun = _File(file, shapes, metadata)
        yield begun
        begun.check_whole()


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of what a file of arrays has behind its header."""
    found = hashlib.sha256()
    for name in _in_order(arrays):
        found.update(_bytes(arrays[name]))
    return found.hexdigest()


def _bytes(array: Leaf) -> memoryview:
    """Return the bytes of an array in the order of its axes, each number's lowest first."""
    array = np.asarray(array, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


def _header(shapes: Shapes) -> Json:
    """Return dtype, shape and place of each tensor."""
    for name, x in shapes.items():
        if x.dtype.name not in DTYPES:
            raise ValueError(
                f"the tensor {name!r} must have a dtype that files of safetensors name, as "
                f"{tuple(DTYPES)}: got {x.dtype}"
            )
    header: Json = {}
    start = 0
    for name in _in_order(shapes):
        x = shapes[name]
        stop = start + x.size * x.dtype.itemsize
        code = DTYPES[x.dtype.name]
        header[name] = {"dtype": code, "shape": [*x.shape], "data_offsets": [start, stop]}
        start = stop
    return header


def _in_order(shapes: Shapes) -> list[str]:
    """Return the names in the order in which a file has them.

    Wide ones are first, so that each begins at a multiple of its own width.
    """
    place = {dtype: i for i, dtype in enumerate(DTYPES)}
    return sorted(shapes, key=lambda name: (place[shapes[name].dtype.name], name))
