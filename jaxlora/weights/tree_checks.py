"""Checks of arguments that are trees of weights, adapters by path, or arrays by target."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlora.messages.checks import shown
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import modules, paths
from jaxlora.weights.adapters import Trained
from jaxlora.weights.nodes import Node
from jaxlora.weights.quantized import QuantizedWeight


def check_tree(params: PyTree, order: str, name: str = "params") -> Leaves:
    """Return the leaves of a tree of weights by path, or raise if it has none."""
    leaves, _ = paths.flatten(params)
    check_leaves(leaves, params, order, name)
    return leaves


def check_leaves(leaves: Leaves, params: PyTree, order: str, name: str = "params") -> None:
    """Raise if these, the leaves of a tree, are no weights."""
    if not leaves:
        raise ValueError(
            f"{name} is an empty tree: it must hold the weights of the program; got {shown(params)}"
        )
    if found := [path for path, leaf in leaves.items() if isinstance(leaf, Trained)]:
        raise TypeError(
            f"{name} must hold weights: got the adapter of {found[0]!r}; "
            "put adapters over their base with jaxlora.bind(base, adapters)"
        )
    if not any(map(is_weight, leaves.values())):
        first = next(iter(leaves.values()))
        held = "" if first is params else f" of {shown(first)}"
        raise TypeError(
            f"{name} must be a tree of arrays: got {shown(params)}{held}; the order is {order}"
        )


def flatten_adapted(params: PyTree, instead: str, bound: str) -> tuple[Leaves, PyTree]:
    """Return the leaves by path and the treedef of a tree with adapted weights, or raise.

    Args:
        params: the tree.
        instead: what to call with an adapted module of Flax NNX.
        bound: what is to be said of adapters without their base.
    """
    modules.refuse_adapted("params", params, instead)
    leaves, treedef = paths.flatten(params)
    for path, leaf in leaves.items():
        if isinstance(leaf, Trained):
            raise TypeError(f"params holds adapters without their base, at {path!r}: {bound}")
    if not any(map(paths.is_trained, leaves.values())):
        raise ValueError(
            f"params has no adapted weight: got {shown(params)}; {modules.advice(params)}"
        )
    return leaves, treedef


def check_adapters(adapters: Any, name: str = "adapters", *, some: bool = False) -> None:
    """Raise if this is no dict of adapters by path, or if it is to hold some and is empty."""
    hint = "jaxlora.split returns the base and such adapters"
    if not isinstance(adapters, Mapping):
        raise TypeError(f"{name} must be a dict of Adapter by path: got {shown(adapters)}; {hint}")
    if some and not adapters:
        raise ValueError(f"{name} is empty: it must hold the factors of at least one weight")
    for path, adapter in adapters.items():
        if not isinstance(path, str):
            got = f"{path!r} of type {type(path).__name__}"
            raise TypeError(f"a path in {name} must be a str: got {got}")
        if not isinstance(adapter, Trained):
            raise TypeError(f"{name}[{path!r}] must be an Adapter: got {shown(adapter)}; {hint}")


def check_matrices(arrays: Any, name: str, source: str = "jaxlora.calibration.moments") -> None:
    """Raise if these are no stacks of matrices by target, as a pass over data returns."""
    needed = f"{name} must be arrays (stack, rows, columns) by target, from {source}"
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{needed}: got {shown(arrays)}")
    if not arrays:
        raise ValueError(f"{needed}: got none")
    for target, array in arrays.items():
        is_array = isinstance(array, jax.Array | np.ndarray) and is_weight(array)
        if not isinstance(target, str) or not is_array:
            raise TypeError(f"{needed}: got {shown(array)} for {target!r}")
        if array.ndim != 3:
            raise ValueError(f"{needed}: got {shown(array)} for {target!r}")
        if not isinstance(array, Tracer) and not jnp.isfinite(array).all():
            raise ValueError(f"{name} must be finite: {target!r} holds NaN or inf")


def check_untraced(call: str, tree: PyTree) -> None:
    """Raise if a function that needs values is called where JAX only traces."""
    if any(isinstance(x, Tracer) for x in (*jax.tree.leaves(tree), jnp.zeros(()))):
        raise TypeError(
            f"{call} is called inside of jax.jit or another transformation, where arrays have no "
            "values: arrays with values are needed: call it on what the transformed function "
            "returns"
        )


def is_weight(leaf: Leaf) -> bool:
    """Tell whether a leaf is an array, the shape of one, or a node that stands for one."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSU"
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)  # a random key is none
    return isinstance(leaf, Node | QuantizedWeight)


def check_plain(leaves: Leaves, name: str, *, with_values: bool = False) -> None:
    """Raise if a leaf is adapted or trained; with values, also if it is the shape of an array."""
    for path, leaf in leaves.items():
        if paths.is_trained(leaf):
            raise ValueError(f"the leaf {path!r} is adapted already: {name} needs a plain tree")
        if with_values and isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"the leaf {path!r} is the shape of an array: {name} needs its values")
