"""Write a file of safetensors, each tensor as it is made, so that not all of them are in memory.

The library of safetensors writes what is in memory. The format is a header in JSON behind its
length, which tells each tensor's dtype, shape and bytes, and then the bytes
(https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from jaxlora.formats.tensors import DTYPES
from jaxlora.types import Json, Leaf


def write(
    path: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], make: Callable[[str], Leaf]
) -> None:
    """Write a file. While a tensor is laid out in order and written, the next is made.

    Args:
        path: the file.
        shapes: shape and dtype of each tensor by name.
        make: returns a tensor, an array of NumPy or of JAX, which need not be ready.

    Raises:
        ValueError: files have no name for a dtype.
        OSError: it cannot be written.
    """
    # wide ones first, so that each begins at a multiple of its own width
    order = sorted(shapes, key=lambda name: -shapes[name].dtype.itemsize)
    text = json.dumps(_header(shapes, order), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, ThreadPoolExecutor(1) as writer:
        file.write(len(text).to_bytes(8, "little") + text)

        def put(name: str, tensor: Leaf) -> None:
            tensor = np.asarray(tensor, order="C")
            assert (tensor.shape, tensor.dtype) == (shapes[name].shape, shapes[name].dtype), name
            file.write(tensor.reshape(-1).view(np.uint8).data)

        last: Future[None] | None = None
        for name in order:
            tensor = make(name)
            if last is not None:
                last.result()
            last = writer.submit(put, name, tensor)
        if last is not None:
            last.result()


def _header(shapes: Mapping[str, jax.ShapeDtypeStruct], order: list[str]) -> Json:
    header: Json = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        shape, dtype = shapes[name].shape, np.dtype(shapes[name].dtype)
        if dtype.name not in DTYPES:
            raise ValueError(
                f"the tensor {name!r} must have a dtype that files of safetensors name, as "
                f"{tuple(DTYPES)}: got {dtype}"
            )
        stop = start + shapes[name].size * dtype.itemsize
        entry = {"dtype": DTYPES[dtype.name], "shape": [*shape], "data_offsets": [start, stop]}
        header[name] = entry
        start = stop
    return header
