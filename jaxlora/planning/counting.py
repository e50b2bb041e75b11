"""How many parameters are trained: rank · (in + out) for each weight of a stack."""

import dataclasses
import math
from collections.abc import Mapping
from typing import overload

import numpy as np

from jaxlora.messages import checks
from jaxlora.reports.counts import summary
from jaxlora.targets.config import LoRAConfig
from jaxlora.targets.selection import select, select_whole
from jaxlora.targets.sites import Sites
from jaxlora.targets.stacking import with_stacks
from jaxlora.types import Leaf, Leaves
from jaxlora.weights import blocks, paths
from jaxlora.weights.adapters import Adapter, Replacement

Shapes = Mapping[str, tuple[int, ...]]


@overload
def count(weights: Shapes, config: int) -> int: ...
@overload
def count(weights: Sites, config: LoRAConfig) -> int: ...
def count(weights: Shapes | Sites, config: int | LoRAConfig) -> int:
    """Count the trained parameters of adapters on some weights.

    Args:
        weights: by any name the shape ``(*stack, in, out)`` of each adapted weight; or the sites of
            a program, see `jaxlora.find_sites`, of which the config chooses.
        config: for shapes the rank, at least 1; for sites a `jaxlora.LoRAConfig`. With it also
            magnitudes, and leaves and rows that are trained themselves, are counted.

    Returns:
        For each weight ``prod(stack) * rank * (in + out)``, summed.

    Raises:
        ValueError: there is no shape, one has less than two axes or one below 1, the rank is below
            1, or the config does not fit the sites.
        TypeError: weights are neither shapes nor sites, or config is not what they need.

    The adapters of rank 8 on query and value of GPT-3 (Hu et al. 2021, arXiv:2106.09685, table 4):

    >>> import jaxlora
    >>> shape = (96, 12288, 12288)
    >>> jaxlora.planning.count({"query": shape, "value": shape}, 8)
    37748736
    """
    if isinstance(weights, Sites):
        if not isinstance(config, LoRAConfig):
            raise TypeError(
                "sites need a jaxlora.LoRAConfig, which chooses of them: got "
                f"{checks.shown(config)}"
            )
        return summary(dict(_trained(weights, config))).trainable
    needed = "weights must be shapes (*stack, in, out) by name, or what jaxlora.find_sites returns"
    if not isinstance(weights, Mapping):
        raise TypeError(f"{needed}: got {checks.shown(weights)}")
    if not weights:
        raise ValueError(f"{needed}: got none")
    if isinstance(config, LoRAConfig):
        raise TypeError(
            "shapes need a rank, an int: got a LoRAConfig, which chooses of what "
            "jaxlora.find_sites returns"
        )
    rank = checks.check_count(config, "rank")
    return sum(_of_shape(name, shape, rank) for name, shape in weights.items())


def _of_shape(name: str, shape: object, rank: int) -> int:
    """Return the parameters of factors of a rank for a stack of matrices."""
    needed = f"the shape of {name!r} must be ints (*stack, in, out)"
    if not isinstance(shape, tuple | list):
        raise TypeError(f"{needed}: got {checks.shown(shape)}")
    if len(shape) < 2:
        raise ValueError(f"{needed}: got {tuple(shape)}")
    *stack, in_, out = (checks.check_count(size, f"a size of {name!r}") for size in shape)
    return math.prod(stack) * rank * (in_ + out)


def _trained(sites: Sites, config: LoRAConfig) -> Leaves:
    """Return what a config trains, with stand-ins of no memory for its arrays."""
    sites = with_stacks(sites, config.stack)
    leaves: Leaves = {path: _stand_in(shape) for path, shape in sites.shapes.items()}
    found: Leaves = {}
    for target in select(config, sites):
        path, roles, block = target.path, sites[target.path].roles, target.block
        sizes = blocks.shape(block, sites.shapes[path])
        a, b = map(_stand_in, roles.factor_shapes(sizes, target.rank))
        term = Adapter(a, b, roles, target.alpha, sites.shapes[path], block=block)
        if config.magnitude:
            magnitude = _stand_in(roles.magnitude_shape(sizes))
            term = dataclasses.replace(term, magnitude=magnitude)
        leaves[path] = paths.with_term(leaves[path], paths.plain(leaves[path]), term)
        found[target.name] = term
    for path, rows in select_whole(config, leaves).items():
        value = leaves[path] if rows is None else leaves[path][list(rows)]
        found[path] = Replacement(value, sites.shapes[path], rows=rows)
    return found


def _stand_in(shape: tuple[int, ...]) -> Leaf:
    return np.broadcast_to(np.zeros((), np.float32), shape)
