"""Write a file of safetensors, each tensor as it is made, so that not all of them are in memory.

The library of safetensors writes what is in memory. The format is a header in JSON behind its
length, which tells each tensor's dtype, shape and bytes, and then the bytes
(https://huggingface.co/docs/safetensors). Tensors lie where that library would put them.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Self

import jax
import numpy as np

from jaxlora.formats.tensors import DTYPES
from jaxlora.types import Json, Leaf

Shapes = Mapping[str, jax.ShapeDtypeStruct] | Mapping[str, np.ndarray]  # of each tensor by name
PYTORCH = MappingProxyType({"format": "pt"})  # metadata of all files that PyTorch is to load


def write(path: Path, shapes: Shapes, make: Callable[[str], Leaf]) -> None:
    """Write a file of tensors that are made one after the other, and wait until the disk has it.

    While a tensor is made, the one before is written, and the disk takes what was.

    Args:
        path: the file.
        shapes: shape and dtype of each tensor by name, in the order in which they are made.
        make: returns a tensor, an array of NumPy or of JAX, which need not be ready.

    Raises:
        ValueError: files have no name for a dtype.
        OSError: it cannot be written.
    """
    with _begun(path, shapes, PYTORCH) as file, _Worker() as disk, _Worker() as writer:

        def put(name: str, tensor: Leaf) -> None:
            file.put(name, tensor)
            if disk.is_free:
                disk.start(file.sync)

        for name in shapes:
            tensor = make(name)
            writer.start(functools.partial(put, name, tensor))
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
            file.put(name, array)


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
        self._start = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)

    def put(self, name: str, tensor: Leaf) -> None:
        """Write a tensor where it belongs."""
        told, got = self._header[name], (list(tensor.shape), DTYPES[tensor.dtype.name])
        assert got == (told["shape"], told["dtype"]), f"{name} is no {told}: got {got}"
        self._file.seek(self._start + told["data_offsets"][0])
        self._file.write(_bytes(tensor))

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def _begun(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> Iterator[_File]:
    with open(path, "wb") as file:
        yield _File(file, shapes, metadata)


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
