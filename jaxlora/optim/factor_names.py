"""The factors in a tree that an optimizer is given, by name."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.tree_util import KeyPath

from jaxlora.trees.masks import mask
from jaxlora.types import Function, PyTree
from jaxlora.weights.adapters import FACTORS

_HOLDER = ("factors",)  # the attribute of a `jaxlora.nnx.Adapted` that holds its factors by path


def factor_names(tree: PyTree) -> list[str | None]:
    """Return for each leaf its name where it is a factor of a node, or of a module of Flax NNX."""
    found = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    marks = jax.tree.leaves(mask(tree))
    if any(marks):
        return [
            keys[-1].name if marked else None for keys, marked in zip(found, marks, strict=True)
        ]
    named = [_unboxed(keys) for keys in found]  # the state of a `jaxlora.nnx.Adapted`
    return [keys[-1] if keys[-3:-2] == _HOLDER and keys[-1] in FACTORS else None for keys in named]


def _unboxed(keys: KeyPath) -> KeyPath:
    """Return the names of keys, without that of a box around a factor."""
    names = tuple(getattr(key, "name", getattr(key, "key", None)) for key in keys)
    return names[:-1] if names[-1:] == ("value",) and {*names[-2:-1]} & {*FACTORS} else names


def by_factor(fn: Function, tree: PyTree, *rest: PyTree) -> PyTree:
    """Return a tree with ``fn(name, leaf, *leaves)`` at each factor of it, by its name."""
    names = iter(factor_names(tree))

    def replaced(leaf, *others):
        name = next(names)
        return fn(name, leaf, *others) if name else leaf

    return jax.tree.map(replaced, tree, *rest)


def init_stateless(params: PyTree) -> PyTree:
    """Return the empty state of a transform, or raise if a tree has no factors."""
    import optax

    check_some(factor_names(params))
    return optax.EmptyState()


def check_some(factors: Sequence[str | None]) -> None:
    """Raise if none of the names of leaves is that of a factor."""
    if not any(factors):
        raise ValueError("the tree has no factors to train: make some with jaxlora.init")


def check_has_params(params: PyTree) -> None:
    """Raise if a transform that needs the factors themselves does not get them."""
    if params is None:
        raise ValueError("the factors themselves are needed: tx.update(updates, state, params)")
