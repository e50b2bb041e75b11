"""What is trained: adapters, leaves, or coordinates in a random subspace, and how they are put in.

Every arm of a classifier also trains its new head, which the pretrained model does not have.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxlora

from .tasks import Task, path_of


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: for tables, and for the files of its runs.
        rank: of the adapters; 0 for none.
        weights: a key of `Task.weights`: which weights have adapters.
        alpha: strength of the adapters.
        rank_stabilized: scale by alpha / √rank.
        leaves: a key of `Task.leaves`: which leaves are trained whole, besides the new ones.
        dimension: train this many coordinates of a random subspace of all parameters, nothing else.
    """

    name: str
    rank: int = 0
    weights: str = "all"
    alpha: float = 0.0
    rank_stabilized: bool = False
    leaves: str = "new"
    dimension: int = 0


FULL = Arm("full fine-tuning", leaves="all")
BIASES = Arm("BitFit", leaves="biases")
HEAD = Arm("head alone", leaves="head")


def lora(
    rank: int = 8, weights: str = "all", *, alpha: float = 0.0, stabilized: bool = False
) -> Arm:
    """Return an arm of LoRA, with an alpha of twice the rank if none is given."""
    scaled = f" alpha {alpha:g}" if alpha else ""
    name = f"{'rsLoRA' if stabilized else 'LoRA'} r{rank} {weights}{scaled}"
    return Arm(name, rank, weights, alpha or 2.0 * rank, stabilized)


COMPARED = (lora(8), FULL, BIASES, HEAD)  # by what they cost and forget, too


def subspace(dimension: int) -> Arm:
    """Return an arm that trains coordinates of a random subspace, a prime number at best."""
    return Arm(f"subspace {dimension}", dimension=dimension)


class Trainable(NamedTuple):
    """What is trained: leaves by path, or ``{"coordinates": (dimension,)}``, and adapters."""

    leaves: dict[str, Any]
    adapters: dict[str, jaxlora.Adapter]


def together(arm: Arm) -> Callable[[Trainable, Any], Any]:
    """Return the function that makes parameters of what is trained and what is not."""
    return _moved if arm.dimension else _replaced


def start(arm: Arm, task: Task, seed: int) -> tuple[Trainable, Any]:
    """Return what is trained, and what is not."""
    key = jax.random.key(seed)
    if arm.dimension:
        signs = _random_signs(key, task)
        return Trainable({"coordinates": jnp.zeros(arm.dimension)}, {}), (task.params, signs)
    leaves = {
        path_of(path): leaf
        for path, leaf in jax.tree.leaves_with_path(task.params)
        if re.fullmatch(f"{task.leaves['new']}|{task.leaves[arm.leaves]}", path_of(path))
    }
    adapters = {}
    if arm.rank:
        config = jaxlora.LoRAConfig(
            rank=arm.rank,
            alpha=arm.alpha,
            rank_stabilized=arm.rank_stabilized,
            targets=task.weights[arm.weights],
        )
        adapted = jaxlora.init(key, task.fn, task.params, *task.example, config=config)
        adapters = jaxlora.split(adapted)[1]
    return Trainable(leaves, adapters), task.params


def _replaced(trainable: Trainable, params: Any) -> Any:
    """Return parameters with leaves in the place of their own, and adapters."""
    params = jax.tree.map_with_path(
        lambda path, leaf: trainable.leaves.get(path_of(path), leaf), params
    )
    return jaxlora.bind(params, trainable.adapters) if trainable.adapters else params


def _random_signs(key: jax.Array, task: Task) -> Any:
    """Return a random sign for each parameter, int8; 0 where full fine-tuning trains nothing."""

    def signs(path, leaf):
        if not re.fullmatch(task.leaves["all"], path):
            return jnp.zeros(leaf.shape, jnp.int8)
        key_of_leaf = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.rademacher(key_of_leaf, leaf.shape, jnp.int8)

    return jax.tree.map_with_path(lambda path, leaf: signs(path_of(path), leaf), task.params)


def _moved(trainable: Trainable, frozen: Any) -> Any:
    """Return parameters moved within a random subspace (Li et al. 2018, arXiv:1804.08838).

    Parameter i of a leaf moves by its sign times coordinate ``i mod dimension``: the directions are
    orthogonal, and no matrix is formed. A prime dimension shares no period with rows of a weight.
    """
    z = trainable.leaves["coordinates"]

    def moved(leaf, sign):
        repeats = -(-leaf.size // z.size)
        step = jnp.tile(z, repeats)[: leaf.size].reshape(leaf.shape)
        return leaf + sign.astype(leaf.dtype) * step

    return jax.tree.map(moved, *frozen)
