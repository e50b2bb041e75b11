"""Adapters from two sets of weights: what a full fine-tuning changed, at a low rank."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxlora.linalg import matrices, svd
from jaxlora.messages import checks, table
from jaxlora.targets.sites import Sites
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import fingerprints, paths, quantized, sharding, tree_checks
from jaxlora.weights.adapters import Adapter, Adapters
from jaxlora.weights.roles import Roles, factor_axes


@dataclasses.dataclass(frozen=True)
class Extracted:
    """Adapters for what changed between two sets of weights; ``str`` is a table.

    Attributes:
        adapters: factors by path, with scaling 1.
        energy: by path, the share of the squared norm of the change that the adapter holds.
        left: by path, the largest change of an element of the leaves that have no adapter.
    """

    adapters: Adapters
    energy: dict[str, float]
    left: dict[str, float]

    def __str__(self) -> str:
        rows = [
            (path, str(adapter.shape), str(adapter.rank), f"{self.energy[path]:.4f}")
            for path, adapter in self.adapters.items()
        ]
        text = table.render_folded(["path", "shape", "rank", "energy"], rows)
        if not self.left:
            return text
        left = [(path, f"{change:.3g}") for path, change in self.left.items()]
        return f"{text}\n\n{table.render_folded(['changed, not adapted', 'by at most'], left)}"


def extract(base: PyTree, finetuned: PyTree, rank: int, *, sites: Sites | None = None) -> Extracted:
    """Return the adapters of a rank that come nearest to the change of each weight.

    They are the largest singular values of ``finetuned - base``, in float32, one weight at a time.
    A weight that did not change gets none. Where its smaller side is less than the rank, an
    adapter has that rank.

    Args:
        base: weights before, a plain tree; where they are quantized, the adapters make up for the
            rounding too.
        finetuned: the same tree after.
        rank: rank of the adapters, at least 1.
        sites: from `jaxlora.find_sites`, how the model uses its weights. Without it every matrix is
            taken to be used as ``x @ w``, and other leaves get no adapter.

    Returns:
        The adapters for base, how much each holds, and what changed and has none.

    Raises:
        TypeError: a leaf is adapted or no array, rank no int, sites not from `jaxlora.find_sites`,
            or it is called in `jax.jit`.
        ValueError: rank is below 1, the trees differ in structure or a leaf in shape, a change is
            not finite, or no weight changed.

    >>> import jax.numpy as jnp, jaxlora
    >>> base, tuned = {"w": jnp.zeros((4, 3))}, {"w": jnp.ones((4, 3))}
    >>> print(jaxlora.algebra.extract(base, tuned, rank=1))
    path  shape   rank  energy
    ----  ------  ----  ------
    w     (4, 3)  1     1.0000
    """
    rank = checks.check_count(rank, "rank")
    if sites is not None and not isinstance(sites, Sites):
        raise TypeError(f"sites must be from jaxlora.find_sites: got {checks.shown(sites)}")
    before, after = (
        tree_checks.check_tree(tree, "extract(base, finetuned, rank)", name)
        for name, tree in (("base", base), ("finetuned", finetuned))
    )
    if list(before) != list(after):
        odd = next(path for path in (*before, *after) if path not in before or path not in after)
        raise ValueError(f"base and finetuned must have the same leaves: {odd!r} is in one alone")
    for path, leaf in (*before.items(), *after.items()):
        if paths.is_trained(leaf):
            raise TypeError(
                f"base and finetuned must be plain trees: {path!r} is adapted, merge it"
            )
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"the leaf {path!r} must be an array: got {checks.shown(leaf)}")
    for leaves in (before, after):
        tree_checks.check_plain(leaves, "extract", with_values=True)
    tree_checks.check_untraced("extract", (base, finetuned))
    adapters, energy, left = {}, {}, {}
    for path, leaf in before.items():
        was, now = quantized.values(leaf), quantized.values(after[path])
        largest = _largest_change(path, was, now)
        if not largest:
            continue
        roles = _roles(path, was, sites)
        if roles is None:
            left[path] = largest
        else:
            change = now.astype(jnp.float32) - was.astype(jnp.float32)
            adapters[path], energy[path] = _adapter(leaf, change, roles, rank)
    if not adapters:
        raise ValueError(f"no weight that an adapter is for has changed; others: {sorted(left)}")
    return Extracted(adapters, energy, left)


def _largest_change(path: str, before: Leaf, after: Leaf) -> float:
    if before.shape != after.shape:
        raise ValueError(
            f"the leaf {path!r} must have one shape: got {before.shape} and {after.shape}"
        )
    if not jnp.issubdtype(before.dtype, jnp.floating):
        return float(jnp.any(before != after))
    largest = float(jnp.max(jnp.abs(after.astype("float32") - before.astype("float32")), initial=0))
    if not math.isfinite(largest):
        raise ValueError(f"the change of the leaf {path!r} is not finite: {largest}")
    return largest


def _roles(path: str, leaf: Leaf, sites: Sites | None) -> Roles | None:
    """Return the roles of the axes of a leaf, None where it can have no adapter."""
    if sites is not None:
        return sites[path].roles if path in sites else None
    is_matrix = leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    return Roles((), (0,), (1,)) if is_matrix else None


def _adapter(before: Leaf, change: Leaf, roles: Roles, rank: int) -> tuple[Adapter, float]:
    """Return the adapter of the change of a weight, and the share of its energy."""
    rank = min(rank, roles.max_rank(before.shape))
    u, s, v = svd.truncated(matrices.of_weight(change, roles), rank)
    known, shapes = sharding.concrete(before), roles.factor_shapes(before.shape, rank)
    a, b = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=known and sharding.along(known, axes))
        for shape, axes in zip(shapes, factor_axes(roles)[:2], strict=True)
    )
    empty = Adapter(a, b, roles, float(rank), tuple(before.shape), fingerprints.take(before))
    return matrices.adapter_of_svd(empty, (u, s, v)), float(jnp.sum(s**2) / jnp.sum(change**2))
