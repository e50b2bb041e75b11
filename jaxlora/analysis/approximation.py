"""How well matrices of a low rank come near to weights, or to what fine-tuning changed of them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.analysis.findings import Findings, register, told
from jaxlora.analysis.spectra import MOST, Spectrum
from jaxlora.linalg import matrices, meshes
from jaxlora.messages import checks
from jaxlora.targets.sites import Sites, check_sites
from jaxlora.trees import changes
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import memory, quantized
from jaxlora.weights.roles import Roles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Explained:
    """How near the best matrices of some ranks come to a matrix (Eckart and Young 1936).

    Attributes:
        spectrum: the singular values of the matrix, of each entry of its stack.
        ranks: the ranks k.
    """

    spectrum: Spectrum
    ranks: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def energy(self) -> jax.Array:
        """Share of the squared norm that is kept at each rank, ``(*stack, len(ranks))``."""
        energy = self.spectrum.energy
        return energy[..., np.minimum(self.ranks, energy.shape[-1]) - 1]

    @property
    def error(self) -> jax.Array:
        """Norm of what is left over that of the matrix, at each rank, ``(*stack, len(ranks))``."""
        left = self.spectrum.left
        return left[..., np.minimum(self.ranks, left.shape[-1]) - 1]

    def rank_for(self, energy: float) -> jax.Array:
        """Return the least rank that keeps this share of the squared norm, ``(*stack,)``."""
        return self.spectrum.rank_for(energy)


@register
@dataclasses.dataclass(frozen=True, repr=False)
class Approximations(Findings[Explained]):
    """How near matrices of a low rank come, by path."""

    header = ("norm", "effective rank", "for 90 %", "energy kept at each rank")

    def cells(self, path: str) -> tuple[str, ...]:
        """Return what the table says of a weight."""
        found = self.found[path]
        kept = [
            f"{rank}: {told(found.energy[..., i], '.1%')}" for i, rank in enumerate(found.ranks)
        ]
        norms = told(found.spectrum.norm), told(found.spectrum.effective_rank)
        return (*norms, told(found.rank_for(MOST), ".0f"), ", ".join(kept))


@overload
def explained(  # pyright: ignore[reportOverlappingOverload]  trees have no narrower type
    weight: jax.Array | np.ndarray,
    ranks: Sequence[int],
    *,
    base: PyTree | None = None,
    sites: Sites | None = None,
) -> Explained: ...


@overload
def explained(
    weight: PyTree,
    ranks: Sequence[int],
    *,
    base: PyTree | None = None,
    sites: Sites | None = None,
) -> Approximations: ...


def explained(
    weight: PyTree,
    ranks: Sequence[int],
    *,
    base: PyTree | None = None,
    sites: Sites | None = None,
) -> Explained | Approximations:
    """Return how near matrices of each rank can come to a weight, or to its change.

    Of the change of a full fine-tuning it tells which rank would have been enough. The singular
    values of one matrix after the other are computed, in float32.

    Args:
        weight: a matrix ``(*stack, in, out)``, or a plain tree of weights.
        ranks: the ranks, each at least 1.
        base: what the weight was before, of the same shape or structure: the change is looked at.
            Of a tree those leaves alone that have changed.
        sites: of a tree, from `jaxlora.find_sites`, how the model uses its weights. Without it
            every matrix is taken to be used as ``x @ w``, and other leaves are not looked at.

    Returns:
        An `Explained`, or of a tree one by path.

    Raises:
        TypeError: weight or base is no array and no tree of them, or holds adapted weights; ranks
            are no ints; sites are not from `jaxlora.find_sites`.
        ValueError: no ranks, or one below 1; a matrix has less than two axes; the structure or a
            shape of base is another; no leaf is left to look at.

    >>> import jax.numpy as jnp, jaxlora
    >>> found = jaxlora.analysis.explained(jnp.diag(jnp.array([3.0, 4.0, 0.0])), (1, 2, 3))
    >>> [f"{error:.2f}" for error in found.error]
    ['0.60', '0.00', '0.00']
    """
    counts = _checked(ranks)
    if isinstance(weight, jax.Array | np.ndarray):
        return Explained(_spectrum_of(weight, base), counts)
    found, left_out = {}, []
    for path, leaf, roles in _leaves(weight, base, sites):
        if roles is None:
            left_out.append(path)
        else:
            found[path] = Explained(_spectrum(leaf, roles), counts)
    if not found:
        got = f"{', '.join(left_out)}; sites tell which are weights" if left_out else "no change"
        raise ValueError(f"there must be a weight to look at: got {got}")
    return Approximations(found, tuple(left_out))


def _checked(ranks: object) -> tuple[int, ...]:
    """Return ranks, or raise for what are none."""
    if not isinstance(ranks, Sequence) or not checks.is_listing(ranks):
        raise TypeError(f"ranks must be ints in order, as (1, 2, 4): got {checks.shown(ranks)}")
    if not ranks:
        raise ValueError("ranks must have at least one: got none")
    return tuple(checks.check_count(rank, f"ranks[{i}]") for i, rank in enumerate(ranks))


def _spectrum_of(matrix: Leaf, base: Leaf | None) -> Spectrum:
    """Return the spectrum of an array, or of what has changed of it."""
    for name, array in (("weight", matrix), ("base", base)):
        if array is None:
            continue
        if not isinstance(array, jax.Array | np.ndarray):
            raise TypeError(f"{name} must be an array, as weight: got {checks.shown(array)}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating: got {checks.shown(array)}")
        if array.ndim < 2 or array.shape != matrix.shape:
            raise ValueError(
                f"{name} must be a matrix (*stack, in, out), both of one shape: got "
                f"{array.shape} beside {matrix.shape}"
            )
    matrix = jnp.asarray(matrix).astype(jnp.float32)
    change = matrix if base is None else matrix - jnp.asarray(base).astype(jnp.float32)
    *stack, in_, out = range(change.ndim)
    return _spectrum(change, Roles(tuple(stack), (in_,), (out,)))


def _leaves(
    weight: PyTree, base: PyTree | None, sites: Sites | None
) -> Iterator[tuple[str, jax.Array, Roles | None]]:
    """Return the leaves to look at, or what has changed of them, with their roles."""
    call = "explained(weight, ranks)"
    if base is not None:
        for change in changes.changes(base, weight, sites, call, ("base", "weight")):
            yield change.path, change.value(), change.roles
        return
    check_sites(sites, may_be_none=True)
    for path, leaf in changes.plain_leaves(weight, call, "weight").items():
        values = quantized.values(memory.on_device(leaf))
        yield path, values, changes.roles_of(path, values, sites)


def _spectrum(leaf: jax.Array, roles: Roles) -> Spectrum:
    count = len(roles.stack)
    stack = count if roles.stack == tuple(range(count)) else 0  # else they are moved to the front
    return meshes.run(_values, (leaf,), stack=stack, roles=roles)


@functools.partial(jax.jit, static_argnames="roles")
def _values(leaf: jax.Array, *, roles: Roles) -> Spectrum:
    return Spectrum(jnp.linalg.svd(matrices.by_entry(leaf, roles), compute_uv=False), None)
