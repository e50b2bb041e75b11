"""What differs between two trees of weights of one structure, as before and after fine-tuning."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxlora.messages import checks
from jaxlora.targets.sites import Sites, check_sites
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import memory, paths, quantized, tree_checks
from jaxlora.weights.roles import Roles


@dataclasses.dataclass(frozen=True)
class Change:
    """A leaf that has changed.

    Attributes:
        path: its path.
        leaf: the leaf before, as it stands in the tree, which may be quantized.
        before: its values.
        after: the values after.
        roles: roles of its axes, None where it is no weight that an adapter is for.
        largest: the largest change of an element; of what is not floating, 1.
    """

    path: str
    leaf: Leaf
    before: jax.Array
    after: jax.Array
    roles: Roles | None
    largest: float

    def value(self) -> jax.Array:
        """Return the change, in float32."""
        return self.after.astype(jnp.float32) - self.before.astype(jnp.float32)


def changes(
    base: PyTree, finetuned: PyTree, sites: Sites | None, call: str, names: tuple[str, str]
) -> Iterator[Change]:
    """Return the leaves that have changed, in the order of the trees.

    Args:
        base: a plain tree.
        finetuned: the same tree later.
        sites: how the model uses its weights; None takes every matrix to be used as ``x @ w``.
        call: the call, for errors.
        names: what the two trees are called there.

    Raises:
        TypeError: a leaf is adapted or no array, sites not from `jaxlora.find_sites`, or it is
            called in `jax.jit`.
        ValueError: the trees differ in structure or a leaf in shape, or a change is not finite.
    """
    check_sites(sites, may_be_none=True)
    before = plain_leaves(base, call, names[0])
    after = plain_leaves(finetuned, call, names[1])
    if list(before) != list(after):
        odd = next(path for path in (*before, *after) if path not in before or path not in after)
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same leaves: {odd!r} is in one alone"
        )
    for path, leaf in before.items():
        was, now = map(quantized.values, memory.on_device((leaf, after[path])))
        if largest := _largest(path, was, now):
            yield Change(path, leaf, was, now, roles_of(path, was, sites), largest)


def plain_leaves(tree: PyTree, call: str, name: str) -> Leaves:
    """Return the leaves of a plain tree with values by path, or raise if it is none."""
    leaves = tree_checks.check_tree(tree, call, name)
    for path, leaf in leaves.items():
        if paths.is_trained(leaf):
            raise TypeError(f"{name} must be a plain tree: {path!r} is adapted, merge it")
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"the leaf {path!r} must be an array: got {checks.shown(leaf)}")
    short = call.partition("(")[0]
    tree_checks.check_plain(leaves, short, with_values=True)
    tree_checks.check_untraced(short, tree)
    return leaves


def roles_of(path: str, leaf: Leaf, sites: Sites | None) -> Roles | None:
    """Return the roles of the axes of a leaf, None where it can have no adapter."""
    if sites is not None:
        return sites[path].roles if path in sites else None
    is_matrix = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return Roles((), (0,), (1,)) if is_matrix else None


def _largest(path: str, before: Leaf, after: Leaf) -> float:
    if before.shape != after.shape:
        raise ValueError(
            f"the leaf {path!r} must have one shape: got {before.shape} and {after.shape}"
        )
    if not jnp.issubdtype(before.dtype, jnp.floating):
        return float(jnp.any(before != after))
    change = after.astype("float32") - before.astype("float32")
    if not jnp.isfinite(change).all():
        raise ValueError(f"the change of the leaf {path!r} is not finite: it holds NaN or inf")
    return float(jnp.max(jnp.abs(change), initial=0))
