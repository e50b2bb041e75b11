"""Arrays of a file, put on the device.

What takes time on a CPU is memory that is new, which the system hands out in small pages. Two
threads are handed nearly twice as much.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxlora.types import PyTree

_LARGE = 2**24  # bytes from which a thread is worth its start


def put(tree: PyTree) -> PyTree:
    """Return a tree of NumPy's arrays on the default device, as `jax.device_put` does."""
    arrays, treedef = jax.tree.flatten(jax.tree.map(_kept, tree))
    if not _is_for_two(arrays):
        return treedef.unflatten(jax.device_put(arrays))
    found = [*arrays]
    with ThreadPoolExecutor(1) as thread:
        others = thread.submit(_put_as, jax.config.jax_default_device, arrays[1::2])
        found[::2] = jax.device_put(arrays[::2])  # here, where the user may have forbidden it
        found[1::2] = others.result()
    return treedef.unflatten(found)


def _is_for_two(arrays: Sequence[np.ndarray]) -> bool:
    """Tell whether two threads are faster, and put the same.

    A thread does not know whether 64 bits are enabled where it was started.
    """
    is_large = len(arrays) > 1 and sum(array.nbytes for array in arrays) >= _LARGE
    is_narrow = all(array.dtype.itemsize <= 4 for array in arrays)
    return is_large and is_narrow and jax.default_backend() == "cpu"


def _put_as(device: jax.Device | str | None, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    """Put arrays as the thread does whose default device this is."""
    with jax.default_device(device):
        return jax.device_put(arrays)


def _kept(array: np.ndarray) -> np.ndarray:
    """Return an array without what is a view of a file and would stay one on JAX's CPU."""
    is_view = not array.flags.owndata and array.flags.c_contiguous
    return array.copy() if is_view else array
