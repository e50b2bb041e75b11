"""What the functions on trees need to know of Flax NNX, without importing it.

A module of NNX is a tree of parameters like any other. An adapted one, `jaxlora.nnx.Adapted`, is
not: its factors are variables beside the weights. Both kinds can only exist once NNX is imported.
"""

import sys

import jax

from jaxlora.types import PyTree
from jaxlora.weights import paths


def is_module(value: object) -> bool:
    """Tell whether a value is a module of Flax NNX."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def is_adapted(value: object) -> bool:
    """Tell whether a value is an adapted module."""
    ours = sys.modules.get("jaxlora.nnx.adapted")
    return ours is not None and isinstance(value, ours.Adapted)


def refuse_adapted(name: str, value: object, instead: str) -> None:
    """Raise if a value is an adapted module, or a module that holds one.

    Args:
        name: name of the argument.
        value: the argument.
        instead: what to call instead.

    Raises:
        TypeError: there is an adapted module in it.
    """
    if is_module(value) and _holds_adapted(value):
        verb = "is" if is_adapted(value) else "holds"
        raise TypeError(
            f"{name} {verb} a jaxlora.nnx.Adapted: a tree of parameters is needed: "
            f"got {type(value).__name__}; {instead}"
        )


def _holds_adapted(module: PyTree) -> bool:
    return any(map(is_adapted, jax.tree.leaves(module, is_leaf=is_adapted)))


def advice(params: PyTree) -> str:
    """Return how to adapt a tree that has no adapted weight, for an error message."""
    if is_module(params):
        return f"adapt the {type(params).__name__} with jaxlora.nnx.adapt"
    return "make some with jaxlora.init"


def parameters(tree: PyTree) -> PyTree:
    """Return a tree without the variables of modules that are no parameters.

    Args:
        tree: any tree; `jaxlora.nnx.Adapted` in it are replaced by their parameters.

    Returns:
        The tree with None in the place of statistics, keys and counts of random streams, caches.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    if is_module(tree) and not _holds_adapted(tree):
        tree = nnx.state(tree)  # as a tree, a module has a shared variable once for each place

    def kept(leaf):
        if is_adapted(leaf):
            return parameters(leaf.params())
        is_parameter = isinstance(leaf, nnx.Param) or not isinstance(leaf, nnx.Variable)
        return leaf if is_parameter or paths.is_trained(leaf.get_raw_value()) else None

    def is_leaf(leaf):
        return is_adapted(leaf) or paths.is_node(leaf) or isinstance(leaf, nnx.Variable)

    return jax.tree.map(kept, tree, is_leaf=is_leaf)
