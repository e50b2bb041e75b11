"""Trees in which arrays stand beside flags, names and functions, which JAX does not trace."""

from collections.abc import Callable, Sequence

import jax

from jaxlora.tracing.program import is_array
from jaxlora.types import Leaf, PyTree


def parted(tree: PyTree) -> tuple[list[Leaf], Callable[[Sequence[Leaf]], PyTree]]:
    """Return the arrays of a tree, and what makes the tree from others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def rebuild(arrays):
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return treedef.unflatten(filled)

    return [leaves[place] for place in places], rebuild


def jitted(compute: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
    """Return a function of a tree that is compiled once for all that differ in arrays alone."""
    made: list[tuple[object, Callable[[Sequence[Leaf]], PyTree]]] = []

    def run(tree):
        leaves, treedef = jax.tree.flatten(tree)
        rest = treedef, [None if is_array(leaf) else leaf for leaf in leaves]
        arrays, rebuild = parted(tree)
        for known, compiled in made:
            if known == rest:
                return compiled(arrays)
        made.append((rest, jax.jit(lambda arrays: compute(rebuild(arrays)))))
        return made[-1][1](arrays)

    return run
