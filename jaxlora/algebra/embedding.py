"""Adapters of a part of a weight as adapters of a larger part, or of all of it.

Sets of adapters may name different parts of one weight. What is combined of them can be put on the
weight only if no element has two adapters, so those of parts that overlap become adapters of the
smallest block around them, with factors that are zero where only the block is.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxlora.weights import blocks
from jaxlora.weights.adapters import Adapter

Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis


def disjoint(adapters: Sequence[dict[str, Adapter]]) -> list[dict[str, list[Adapter]]]:
    """Return sets of adapters whose parts are equal or have no element in common.

    Args:
        adapters: sets of factors by path.

    Returns:
        For each set the adapters by the name of the block that they are for. There are several
        for one where a set has several parts of what is one block in another set.

    Raises:
        ValueError: adapters of one path are for different weights.
    """
    located = [{name: _located(name, x) for name, x in group.items()} for group in adapters]
    around: dict[str, list[Bounds]] = {}
    first: dict[str, Adapter] = {}
    for group, places in zip(adapters, located, strict=True):
        for name, (path, bounds) in places.items():
            _check_alike(path, group[name], first.setdefault(path, group[name]))
            around[path] = _joined(around.get(path, []), bounds)
    sets = []
    for group, places in zip(adapters, located, strict=True):
        found: dict[str, list[Adapter]] = {}
        for name, adapter in group.items():
            path, bounds = places[name]
            (block,) = (block for block in around[path] if blocks.overlap(block, bounds))
            embedded = _embedded(adapter, bounds, block)
            part = blocks.normal(block, adapter.shape)
            found.setdefault(blocks.name(path, part), []).append(
                dataclasses.replace(embedded, block=part)
            )
        sets.append(found)
    return sets


def _located(name: str, adapter: Adapter) -> tuple[str, Bounds]:
    """Return the path of the weight of an adapter, and the bounds of the part that it is for."""
    path, text = blocks.parse(name)
    whole = adapter.roles.factor_shapes(adapter.shape, adapter.rank)
    if whole == (adapter.a.shape, adapter.b.shape):  # the path itself may end in brackets
        path, text = name, None
    part = blocks.resolve(text, adapter.shape)
    around = zip(blocks.padding(part, adapter.shape), adapter.shape, strict=True)
    return path, tuple((low, size - high) for (low, high), size in around)


def _check_alike(path: str, adapter: Adapter, first: Adapter) -> None:
    """Raise if two adapters of one path are known to be for different weights."""
    if (adapter.roles, adapter.shape) != (first.roles, first.shape):
        raise ValueError(
            f"the adapters of {path!r} are for different weights: {adapter.shape} with "
            f"{adapter.roles} and {first.shape} with {first.roles}"
        )
    if not adapter.fingerprint.may_equal(first.fingerprint):
        raise ValueError(
            f"the adapters of {path!r} are for different weights: with hash "
            f"{adapter.fingerprint.digest} and with hash {first.fingerprint.digest}"
        )


def _joined(apart: Sequence[Bounds], block: Bounds) -> list[Bounds]:
    """Return blocks and one more, those that overlap as the smallest block around them."""
    while touched := [other for other in apart if blocks.overlap(other, block)]:
        apart = [other for other in apart if other not in touched]
        edges = zip(block, *touched, strict=True)
        block = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in edges)
    return [*apart, block]


def _embedded(adapter: Adapter, bounds: Bounds, block: Bounds) -> Adapter:
    """Return an adapter of a block around the part that another is for, its product the same."""
    if bounds == block:
        return adapter
    more = [(a - low, high - b) for (a, b), (low, high) in zip(bounds, block, strict=True)]
    groups = (adapter.roles.stack, adapter.roles.in_, adapter.roles.out)
    stack, in_, out = ([more[axis] for axis in axes] for axes in groups)
    a = jnp.pad(adapter.a, [*stack, *in_, (0, 0)])
    return dataclasses.replace(adapter, a=a, b=jnp.pad(adapter.b, [*stack, (0, 0), *out]))
