"""What the user's choices choose: the weights to adapt, each with its part, rank and alpha.

Every target must match; what matches nothing is a mistake in the target, not a wish to adapt
nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.targets.config import LoRAConfig, Targets
from jaxlora.targets.patterns import (
    contains,
    ends_in,
    hint,
    layer,
    matched,
    matches,
    means,
    without_all,
)
from jaxlora.targets.sites import Sites, is_bias
from jaxlora.types import Leaf, Leaves
from jaxlora.weights import blocks, paths
from jaxlora.weights.target import Target

Shapes = dict[str, tuple[int, ...]]
Rows = tuple[int, ...] | None


def select(config: LoRAConfig, sites: Sites) -> list[Target]:
    """Return what to adapt, in the order of the tree.

    Args:
        config: the targets and the rank.
        sites: what `jaxlora.find_sites` found.

    Returns:
        Paths of sites and parts of them, every one able to hold factors of the rank.

    Raises:
        ValueError: a target matches nothing, or no site; a named weight is smaller than its rank;
            two parts of a weight overlap; a layer or a name in a pattern is of no target; nothing
            is left to adapt.
    """
    excluded = {path for _, path in _matched(config.exclude, "exclude", sites.shapes)}
    takes_all, names = without_all(config.targets)
    found = _usable(names, sites, _trained_whole(config, sites.shapes))
    own = {(path, _part(names, name, path, sites)) for name, path in found}
    every = {site.path for site in sites if takes_all and not site.is_looked_up}
    every -= {path for path, _ in own}
    wanted = own | {(path, None) for path in every}
    wanted = {(path, part) for path, part in wanted if path not in excluded}
    if config.layers is not None:
        wanted = set(_in_layers(config.layers, wanted, sites))
    chosen = [_target(config, path, part, sites.shapes[path]) for path, part in wanted]
    chosen = [t for t in chosen if t.path not in every or t.rank <= sites[t.path].max_rank]
    _check_parts(chosen, sites)
    if not chosen:
        raise ValueError(
            f"nothing to adapt: targets={config.targets!r} and exclude={config.exclude!r} leave "
            f"no site for rank {config.rank}; the leaves are:\n{sites}"
        )
    _check_patterns(config, chosen, sites.shapes)
    if config.magnitude:
        cut = [t for t in chosen if not blocks.has_all_of(t.block, sites[t.path].in_)]
        if names := [target.name for target in cut[:3]]:
            raise ValueError(
                "only parts with whole columns, all along the in axes, have magnitudes: "
                f"got {names}"
            )
    order = {path: i for i, path in enumerate(sites.shapes)}
    return sorted(chosen, key=lambda target: (order[target.path], target.name))


def select_whole(config: LoRAConfig, leaves: Leaves) -> dict[str, tuple[int, ...] | None]:
    """Return the leaves to train beside the factors, each with its rows, None for all of it.

    Args:
        config: what to train.
        leaves: the leaves by path, adapted at the targets.

    Raises:
        ValueError: a name matches no leaf, an adapted one, or one that is not floating; a leaf is
            named twice; it has no such row; there is no bias to train.
    """
    found: dict[str, tuple[str, Rows]] = {}
    named: list[tuple[str, list[str], Rows]] = []
    if config.train:
        named += [(name, of, None) for name, of in matches(config.train, leaves).items()]
    if config.bias != "none":
        named.append(("bias", _biases(config.bias, leaves), None))
    for name, rows in config.rows.items():
        named.append((name, [path for path in leaves if means(name, path, None, ())], tuple(rows)))
    for name, of, rows in named:
        if not of:
            raise ValueError(
                f"{name!r} is to be trained, but is no leaf; {paths.nearest(name, leaves)}"
                f"{hint(name, is_expression=name == config.train)}"
            )
        for path in of:
            if found.setdefault(path, (name, rows))[1] != rows:
                raise ValueError(f"{path!r} is to be trained twice: {name!r}, {found[path][0]!r}")
    for path, (name, rows) in found.items():
        _check_trainable(name, path, leaves[path], rows)
    return {path: found[path][1] for path in leaves if path in found}


def _biases(which: str, leaves: Leaves) -> list[str]:
    """Return the paths of the biases, all or those beside adapted weights, that have no adapter."""
    beside = {path.rpartition("/")[0] for path in leaves if paths.is_trained(leaves[path])}
    found = [path.rpartition("/") for path in leaves if not paths.is_trained(leaves[path])]
    return [
        "".join(path)
        for path in found
        if is_bias(path[2]) and (which == "all" or path[0] in beside)
    ]


def _check_trainable(name: str, path: str, leaf: Leaf, rows: tuple[int, ...] | None) -> None:
    if paths.is_trained(leaf):
        raise ValueError(f"{name!r} is to be trained, and {path!r} is adapted: exclude it")
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise ValueError(f"only floating leaves can be trained: {path!r} is {leaf}")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"what is trained itself starts from values: {path!r} is {leaf}")
    if rows and (not leaf.shape or rows[-1] >= leaf.shape[0]):
        raise ValueError(f"{path!r} of shape {leaf.shape} has no row {rows[-1]}")


def _part(targets: Targets, name: str, path: str, sites: Sites) -> blocks.Part | None:
    """Return the part of the leaf at a path that a target means."""
    if isinstance(targets, str) or contains(path, name):
        return None
    return blocks.resolve(blocks.parse(name)[1], sites.shapes[path])


def _in_layers(
    layers: Sequence[int], named: set[tuple[str, blocks.Part | None]], sites: Sites
) -> Iterator[tuple[str, blocks.Part | None]]:
    """Yield what of the named weights and parts lies in some layers; each has to be somewhere."""
    found: set[int] = set()
    for path, part in named:
        stack, number = sites[path].stack, layer(path)
        if number is not None:
            found.add(number)
            if number in layers:
                yield path, part
        elif stack:
            size = sites.shapes[path][stack[0]]
            bounds = part[stack[0]] if part else None
            held = range(*bounds) if bounds else range(size)
            found.update(held)
            kept = [index for index in layers if index in held]
            for start, stop in _runs(kept):
                yield path, _cut(part, stack[0], (start, stop), sites.shapes[path])
    if missing := sorted(set(layers) - found):
        without = "" if found else _without_layers(named)
        raise ValueError(
            f"the targets have no layers {missing}: they have {sorted(found)}{without}"
        )


def _without_layers(named: set[tuple[str, blocks.Part | None]]) -> str:
    """Return what to do where no target is in a layer."""
    paths_of = ", ".join(repr(path) for path in sorted(path for path, _ in named)[:3])
    return (
        "; a layer is a number that ends a path part, as in 'block_3', or an entry along the "
        f"first stack axis, and {paths_of or 'nothing'} has neither: choose layers by targets"
    )


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop of each run of following indices, which are in increasing order.

    >>> _runs((0, 1, 2, 5))
    [(0, 3), (5, 6)]
    """
    starts = [i for i in indices if i - 1 not in indices]
    stops = [i + 1 for i in indices if i + 1 not in indices]
    return list(zip(starts, stops, strict=True))


def _cut(
    part: blocks.Part | None, axis: int, bounds: tuple[int, int], shape: Sequence[int]
) -> blocks.Part | None:
    """Return a part, with other bounds along one axis, of a weight of some shape."""
    cut = list(part or [None] * len(shape))
    cut[axis] = bounds
    return blocks.normal(cut, shape)


def _target(
    config: LoRAConfig, path: str, part: blocks.Part | None, shape: tuple[int, ...]
) -> Target:
    """Return a target with the rank and alpha that the patterns, or else the config, give it."""
    values: dict[str, Any] = {"rank_pattern": config.rank, "alpha_pattern": config.alpha}
    for field, default in values.items():
        pattern = getattr(config, field)
        keys = [key for key in pattern if means(key, path, part, shape)]
        if len(keys) > 1:
            raise ValueError(f"{field} must name {blocks.name(path, part)!r} once: got {keys}")
        values[field] = pattern[keys[0]] if keys else default
    rank, alpha = values.values()
    return Target(path, part, rank, config.plain_alpha(alpha, rank))


def _check_patterns(config: LoRAConfig, chosen: list[Target], shapes: Shapes) -> None:
    """Raise if a pattern names something that is not adapted."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(means(key, *t[:2], shapes[t.path]) for t in chosen):
                near = paths.nearest(key, [target.path for target in chosen])
                raise ValueError(f"{field} names {key!r}, which is no target; {near}")


def _check_parts(chosen: list[Target], sites: Sites) -> None:
    """Raise if a part is smaller than its rank, or two parts of one weight overlap."""
    for path, part, rank, _ in sorted(chosen, key=str):
        shape = blocks.shape(part, sites.shapes[path])
        if rank > (side := sites[path].roles.max_rank(shape)):
            raise ValueError(
                f"rank {rank} is too large for {blocks.name(path, part)!r} of shape {shape}: "
                f"its smaller side is {side}"
            )
        for other in (t.block for t in chosen if t.path == path and t.block != part):
            if blocks.overlap(part, other):
                names = f"{blocks.name(path, part)!r} and {blocks.name(path, other)!r}"
                raise ValueError(f"the targets {names} overlap: one element has one adapter")


def _matched(targets: Targets, word: str, shapes: Shapes) -> list[tuple[str, str]]:
    """Return targets with each path they match; each has to match one."""
    found = matches(targets, shapes) if targets else {}
    for name, of in found.items():
        if not of:
            more = hint(name, is_expression=isinstance(targets, str))
            near = paths.nearest(name, shapes)
            raise ValueError(f"{word} {name!r} matches no leaf; {near}{more}")
    return [(name, path) for name, of in found.items() for path in of]


def _usable(targets: Targets, sites: Sites, trained: set[str]) -> list[tuple[str, str]]:
    """Return targets with each weight they match; each has to match one that can be adapted.

    What no rule consumes runs dense, and so has to be meant: by its own name, or by a target that
    matches no other weight.
    """
    usable = []
    matched = _matched(targets, "target", sites.shapes)
    for name in dict.fromkeys(name for name, _ in matched):
        found = [path for of, path in matched if of == name]
        low_rank = [path for path in found if path in sites]
        dense = [path for path in found if path in sites.dense and path not in trained]
        if low_rank:
            is_name = not isinstance(targets, str)
            dense = [path for path in dense if is_name and ends_in(path, name)]
        if not low_rank and not dense:
            raise ValueError(_no_site(name, found, sites))
        usable += [(name, path) for path in found if path in {*low_rank, *dense}]
    return usable


def _no_site(name: str, found: list[str], sites: Sites) -> str:
    """Return the message for a target that matches leaves, none of which can be adapted."""
    why = "; ".join(f"{path!r}: {sites.skipped[path]}" for path in found[:3])
    near = paths.nearest(name, sites.sites).removeprefix("nearest: ")
    return (
        f"target {name!r} matches no leaf that a supported operation consumes ({why}); "
        f"nearest sites: {near}"
    )


def _trained_whole(config: LoRAConfig, candidates: Iterable[str]) -> set[str]:
    """Return the leaves that the config names to be trained whole or by rows."""
    candidates = list(candidates)
    by_rows = (path for path in candidates for key in config.rows if means(key, path, None, ()))
    biases = (path for path in candidates if config.bias != "none" and is_bias(path))
    return {*matched(config.train, candidates), *by_rows, *biases}
