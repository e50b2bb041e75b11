"""The one name of a leaf: its path, the same for Linen, NNX and plain trees.

A path is the keys from the root to the leaf, joined by ``/``: ``params/block_0/query/kernel``.
The attribute ``value`` of a box (`flax.nnx.Param`, `flax.linen.Partitioned`) adds no part, so
that an NNX state, a boxed and a plain tree of one model have one set of paths.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxlora.weight import Adapter, LoRAWeight


def is_node(leaf: Any) -> bool:
    """Tell whether this is a node of ours, which tree functions must not open."""
    return isinstance(leaf, LoRAWeight | Adapter)


def _part(key: Any) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case GetAttrKey():
            return key.name
        case SequenceKey():
            return str(key.idx)
    return str(key)


def _is_box(key: Any) -> bool:
    return isinstance(key, GetAttrKey) and key.name == "value"


def path_of(key_path: Iterable[Any]) -> str:
    """Return the path of a leaf from its keys in the sense of `jax.tree_util`."""
    return "/".join(_part(key) for key in key_path if not _is_box(key))


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Flatten a tree to leaves by path, with `LoRAWeight` and `Adapter` as leaves.

    Args:
        tree: any pytree.

    Returns:
        The leaves by path, in the order of the tree, and the treedef.

    Raises:
        ValueError: two leaves have the same path.
    """
    leaves: dict[str, Any] = {}
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    for key_path, leaf in flat:
        path = path_of(key_path)
        if path in leaves:
            raise ValueError(
                f"two leaves have the path {path!r}: every leaf needs a path of its own"
            )
        leaves[path] = leaf
    return leaves, treedef


def nearest(path: str, candidates: Iterable[str], count: int = 3) -> str:
    """Return a phrase that names the candidates most like a path, for an error message."""
    candidates = list(candidates)
    if not candidates:
        return "there are none"
    parts = {part: full for full in reversed(candidates) for part in (*full.split("/"), full)}
    close = difflib.get_close_matches(path, parts, n=3 * count, cutoff=0.4)
    found = list(dict.fromkeys(parts[part] for part in close)) or candidates
    return "nearest: " + ", ".join(repr(name) for name in found[:count])
