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
    first, *others = arrays
    first = jax.device_put(first)  # an error here, where the user has forbidden it
    (device,) = first.devices()

    def put_there(part: Sequence[np.ndarray]) -> list[jax.Array]:
        with jax.default_device(device):  # which a thread does not know
            return jax.device_put(part)

    with ThreadPoolExecutor(1) as thread:
        half = thread.submit(put_there, others[::2])
        others[1::2] = jax.device_put(others[1::2])
        others[::2] = half.result()
    return treedef.unflatten([first, *others])


def _is_for_two(arrays: Sequence[np.ndarray]) -> bool:
    """Tell whether two threads are faster, and put the same.

    A thread does not know whether 64 bits are enabled where it was started.
    """
    is_large = len(arrays) > 1 and sum(array.nbytes for array in arrays) >= _LARGE
    is_narrow = all(array.dtype.itemsize <= 4 for array in arrays)
    return is_large and is_narrow and jax.default_backend() == "cpu"


def _kept(array: np.ndarray) -> np.ndarray:
    """Return an array without what is a view of a file and would stay one on JAX's CPU."""
    is_view = not array.flags.owndata and array.flags.c_contiguous
    return array.copy() if is_view else array
