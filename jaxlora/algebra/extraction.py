"""Adapters from two sets of weights: what a full fine-tuning changed, at a low rank."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlora.linalg import matrices, meshes, svd
from jaxlora.messages import checks, table
from jaxlora.targets.sites import Sites
from jaxlora.trees.changes import changes
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import fingerprints, sharding
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
    call, names = "extract(base, finetuned, rank)", ("base", "finetuned")
    adapters, energy, left = {}, {}, {}
    for change in changes(base, finetuned, sites, call, names):
        if change.roles is None:
            left[change.path] = change.largest
        else:
            found = _adapter(change.leaf, change.value(), change.roles, rank)
            adapters[change.path], energy[change.path] = found
    if not adapters:
        raise ValueError(f"no weight that an adapter is for has changed; others: {sorted(left)}")
    return Extracted(adapters, energy, left)


def _adapter(before: Leaf, change: Leaf, roles: Roles, rank: int) -> tuple[Adapter, float]:
    """Return the adapter of the change of a weight, and the share of its energy."""
    rank = min(rank, roles.max_rank(before.shape))
    u, s, v = meshes.run(_decomposed, (change,), roles=roles, rank=rank)
    known, shapes = sharding.concrete(before), roles.factor_shapes(before.shape, rank)
    a, b = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=known and sharding.along(known, axes))
        for shape, axes in zip(shapes, factor_axes(roles)[:2], strict=True)
    )
    empty = Adapter(a, b, roles, float(rank), tuple(before.shape), fingerprints.take(before))
    return matrices.adapter_of_svd(empty, (u, s, v)), float(jnp.sum(s**2) / jnp.sum(change**2))


def _decomposed(change: jax.Array, *, roles: Roles, rank: int) -> svd.SVD:
    return svd.truncated(matrices.of_weight(change, roles), rank)
