"""The one name of a leaf: its path, the same for Linen, NNX and plain trees.

A path is the keys from the root to the leaf, joined by ``/``: ``params/block_0/query/kernel``.
The attribute ``value`` of a box (`flax.nnx.Param`, `flax.linen.Partitioned`) adds no part, so
that an NNX state, a boxed and a plain tree of one model have one set of paths.
"""

import dataclasses
import difflib
import zlib
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights.adapters import Adapter, Trained
from jaxlora.weights.nodes import LoRAWeight, Node, TrainedLeaf
from jaxlora.weights.quantized import QuantizedWeight


def is_node(leaf: Leaf) -> bool:
    """Tell whether this is a node of ours, which tree functions must not open."""
    return is_trained(leaf) or isinstance(leaf, QuantizedWeight)


def is_trained(leaf: Leaf) -> bool:
    """Tell whether this is a node that holds what is trained."""
    return isinstance(leaf, Node | Trained)


def plain(leaf: Leaf) -> Leaf:
    """Return the frozen array or quantized weight beneath a node of a tree, or the leaf itself."""
    return leaf.base if isinstance(leaf, Node) else leaf


def with_base(leaf: Leaf, base: Leaf) -> Leaf:
    """Return a leaf or node with another frozen weight beneath it."""
    is_over = isinstance(leaf, LoRAWeight | TrainedLeaf)
    return dataclasses.replace(leaf, base=base) if is_over else base


def with_term(leaf: Leaf, base: Leaf, term: Adapter) -> LoRAWeight:
    """Return the node over a base with the terms of a leaf, if it has any, and one more."""
    return LoRAWeight(base, (*(leaf.terms if isinstance(leaf, LoRAWeight) else ()), term))


def abstract(leaf: Leaf) -> Leaf:
    """Return the shape and dtype of what a quantized weight stands for, or the leaf itself."""
    return leaf.abstract if isinstance(leaf, QuantizedWeight) else leaf


def _part(key: object) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return str(key)


def names(key_paths: Sequence[KeyPath], skip: int = 0) -> list[str]:
    """Return the path of each leaf of a tree from its keys in the sense of `jax.tree_util`.

    Args:
        key_paths: the keys of every leaf.
        skip: leave out so many keys at the root.

    Returns:
        Paths in the same order; the attribute ``value`` of a node that has no other is left out.
    """
    children: dict[KeyPath, set[object]] = {}
    for keys in key_paths:
        for i, key in enumerate(keys):
            children.setdefault(tuple(keys[:i]), set()).add(key)

    def is_box(keys, i):
        is_value = isinstance(keys[i], GetAttrKey) and keys[i].name == "value"
        return is_value and len(children[tuple(keys[:i])]) == 1

    return [
        "/".join(_part(keys[i]) for i in range(skip, len(keys)) if not is_box(keys, i))
        for keys in key_paths
    ]


def flatten(tree: PyTree) -> tuple[Leaves, PyTree]:
    """Flatten a tree to leaves by path, with `LoRAWeight` and `Adapter` as leaves.

    Args:
        tree: any pytree.

    Returns:
        The leaves by path, in the order of the tree, and the treedef.

    Raises:
        ValueError: two leaves have the same path.
    """
    leaves: Leaves = {}
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    for path, (_, leaf) in zip(names([keys for keys, _ in flat]), flat, strict=True):
        if path in leaves:
            raise ValueError(
                f"two leaves have the path {path!r}: every leaf needs a path of its own"
            )
        leaves[path] = leaf
    return leaves, treedef


def random_key(key: jax.Array, path: str) -> jax.Array:
    """Return the random key of a path, which no other path changes."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


_STATES = frozenset({"BatchStat", "Cache", "Intermediate", "Perturbation", "RngState"})


def states(tree: PyTree) -> set[str]:
    """Return the paths of what Flax keeps beside the parameters, as statistics and caches.

    In Linen variables that is what is not in ``params``; in an NNX state it is told by the class
    of the variable. Flax is not imported for it.
    """

    def is_state(leaf):
        return any(
            c.__name__ in _STATES and c.__module__.startswith("flax.nnx")
            for c in type(leaf).__mro__
        )

    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_node(x) or is_state(x)
    )
    found = zip(names([keys for keys, _ in flat]), flat, strict=True)
    is_linen = isinstance(tree, Mapping) and "params" in tree
    return {
        path
        for path, (_, leaf) in found
        if is_state(leaf) or (is_linen and path.partition("/")[0] != "params")
    }


def nearest(path: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return a phrase that names the candidates most like a path, for an error message."""
    candidates = list(candidates)
    if not candidates:
        return "there are none"
    parts = {part: full for full in reversed(candidates) for part in (*full.split("/"), full)}
    close = difflib.get_close_matches(path, parts, n=3 * count, cutoff=0.4)
    found = list(dict.fromkeys(parts[part] for part in close)) or candidates
    return "nearest: " + ", ".join(repr(name) for name in found[:count])
