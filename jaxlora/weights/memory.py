"""Which memory weights are in: that of the devices, or that of their host, which has more room.

A program whose weights are in host memory moves each to the device where it uses it. What is
computed from a weight outside of a program is computed on the devices, and what takes its place is
put where it was. Factors are in the memory of the devices.
"""

import jax

from jaxlora.types import Leaf, PyTree


def is_on_host(weight: Leaf) -> bool:
    """Tell whether a weight or the shape of one is in host memory, a quantized one by its codes."""
    return any(map(_is_on_host, jax.tree.leaves(weight)))


def on_device(tree: PyTree) -> PyTree:
    """Return a tree with its arrays in the memory of the devices that they belong to."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree
    )


def beside(weight: Leaf, tree: PyTree) -> PyTree:
    """Return a tree with its arrays in host memory if a weight is there, else as it is."""
    return jax.device_put(tree, jax.memory.Space.Host) if is_on_host(weight) else tree


def _is_on_host(array: Leaf) -> bool:
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.sharding is not None and array.sharding.memory_kind == "pinned_host"
    return isinstance(array, jax.Array) and jax.typeof(array).memory_space == jax.memory.Space.Host
