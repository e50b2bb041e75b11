"""Write a file of safetensors, each tensor as it is made, so that not all of them are in memory.

The library of safetensors writes what is in memory. The format is a header in JSON behind its
length, which tells each tensor's dtype, shape and bytes, and then the bytes
(https://huggingface.co/docs/safetensors). Tensors lie where that library would put them.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from jaxlora.formats.tensors import DTYPES
from jaxlora.types import Json, Leaf

Shapes = Mapping[str, jax.ShapeDtypeStruct]  # shape and dtype of each tensor by name
PYTORCH = MappingProxyType({"format": "pt"})  # metadata of all files that PyTorch is to load


def write(
    path: Path,
    shapes: Shapes,
    make: Callable[[str], Leaf],
    metadata: Mapping[str, str] = PYTORCH,
) -> None:
    """Write a file. While a tensor is laid out in order and written, the next is made.

    Args:
        path: the file.
        shapes: shape and dtype of each tensor by name, in the order in which they are made.
        make: returns a tensor, an array of NumPy or of JAX, which need not be ready.
        metadata: what the header says beside them.

    Raises:
        ValueError: files have no name for a dtype.
        OSError: it cannot be written.
    """
    header = _header(shapes)
    about: Json = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(about | header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as writer:
        file.write(len(text).to_bytes(8, "little") + text)

        def put(name: str, tensor: Leaf) -> None:
            assert (tensor.shape, tensor.dtype) == (shapes[name].shape, shapes[name].dtype), name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(_bytes(tensor))

        last: Future[None] | None = None
        for name in shapes:
            tensor = make(name)
            if last is not None:
                last.result()
            last = writer.submit(put, name, tensor)
        if last is not None:
            last.result()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a file of arrays that are in memory, see `write`."""
    write(path, _shapes(arrays), lambda name: np.asarray(arrays[name], order="C"), metadata)


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of what a file of arrays has behind its header."""
    found = hashlib.sha256()
    for name in _in_order(_shapes(arrays)):
        found.update(_bytes(arrays[name]))
    return found.hexdigest()


def _shapes(arrays: Mapping[str, np.ndarray]) -> Shapes:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}


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
