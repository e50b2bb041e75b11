"""What the user's choices choose: the weights to adapt, each with its part, rank and alpha.

A target is a name (a run of whole path parts: ``"query"``, ``"mlp/up"``) or the one regular
expression that has to match whole paths. Every target must match; what matches nothing is a
mistake in the target, not a wish to adapt nothing.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora import parts, paths
from jaxlora.config import ALL_LINEAR, LoRAConfig, Targets
from jaxlora.sites import Sites


class Target(NamedTuple):
    """A weight to adapt, or a part of one.

    Attributes:
        path: path of the leaf.
        part: the block of it that is adapted, None for all of it.
        rank: rank of its factors.
        alpha: numerator of their scaling alpha / rank.
    """

    path: str
    part: parts.Part | None
    rank: int
    alpha: float


def _contains(path: str, name: str) -> bool:
    """Tell whether a name is a run of whole parts of a path."""
    return f"/{name.strip('/')}/" in f"/{path}/"


def matches(targets: Targets, candidates: Iterable[str]) -> dict[str, list[str]]:
    """Return for each target the paths it matches, in order; a regular expression is one target."""
    candidates = list(candidates)
    if isinstance(targets, str):
        return {targets: [path for path in candidates if re.fullmatch(targets, path)]}
    found = {name: [path for path in candidates if _contains(path, name)] for name in targets}
    for name in (name for name, paths_of in found.items() if not paths_of):  # perhaps of a part
        found[name] = [path for path in candidates if _contains(path, parts.parse(name)[0])]
    return found


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
    excluded = {p for _, p in _matched(config.exclude, "exclude", sites)} if config.exclude else ()
    is_all = config.targets == ALL_LINEAR
    if is_all:
        named = {(site.path, None) for site in sites if not site.is_lookup}
    else:
        matched = _matched(config.targets, "target", sites, only_sites=True)
        named = {(path, _part(config.targets, name, path, sites)) for name, path in matched}
    named = {(path, part) for path, part in named if path not in excluded}
    if config.layers is not None:
        named = set(_in_layers(config.layers, named, sites))
    chosen = [_target(config, path, part, sites.shapes[path]) for path, part in named]
    if is_all:
        chosen = [target for target in chosen if target.rank <= sites[target.path].max_rank]
    else:
        _check_parts(chosen, sites)
    if not chosen:
        raise ValueError(
            f"nothing to adapt: targets={config.targets!r} and exclude={config.exclude!r} leave "
            f"no site for rank {config.rank}; the leaves are:\n{sites}"
        )
    _check_patterns(config, chosen, sites.shapes)
    if config.magnitude:
        cut = [t for t in chosen if not parts.has_entries(t.part, sites[t.path].stack)]
        if names := [parts.name(*target[:2]) for target in cut[:3]]:
            raise ValueError(
                f"only whole weights or entries of a stack have magnitudes: got {names}"
            )
    order = {path: i for i, path in enumerate(sites.shapes)}
    return sorted(chosen, key=lambda target: (order[target.path], parts.name(*target[:2])))


def select_whole(config: LoRAConfig, leaves: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return the leaves to train beside the factors, each with its rows, None for all of it.

    Args:
        config: what to train.
        leaves: the leaves by path, adapted at the targets.

    Raises:
        ValueError: a name matches no leaf, an adapted one, or one that is not floating; a leaf is
            named twice; it has no such row; there is no bias to train.
    """
    found: dict[str, tuple[str, Any]] = {}
    named: list[tuple[str, list[str], Any]] = []
    if config.train:
        named += [(name, of, None) for name, of in matches(config.train, leaves).items()]
    if config.bias != "none":
        named.append(("bias", _biases(config.bias, leaves), None))
    for name, rows in config.rows.items():
        named.append((name, [path for path in leaves if _means(name, path, None, ())], rows))
    for name, of, rows in named:
        if not of:
            raise ValueError(
                f"{name!r} is to be trained, but is no leaf; {paths.nearest(name, leaves)}"
            )
        for path in of:
            if found.setdefault(path, (name, rows))[1] != rows:
                raise ValueError(f"{path!r} is to be trained twice: {name!r}, {found[path][0]!r}")
    for path, (name, rows) in found.items():
        _check_trainable(name, path, leaves[path], rows)
    return {path: found[path][1] for path in leaves if path in found}


def _biases(which: str, leaves: dict[str, Any]) -> list[str]:
    """Return the paths of the biases, all or those beside adapted weights, that have no adapter."""
    beside = {path.rpartition("/")[0] for path in leaves if paths.is_trained(leaves[path])}
    found = [path.rpartition("/") for path in leaves if not paths.is_trained(leaves[path])]
    return [
        "".join(path)
        for path in found
        if path[2] in ("bias", "b") and (which == "all" or path[0] in beside)
    ]


def _check_trainable(name: str, path: str, leaf: Any, rows: tuple[int, ...] | None) -> None:
    if paths.is_trained(leaf):
        raise ValueError(f"{name!r} is to be trained, and {path!r} is adapted: exclude it")
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise ValueError(f"only floating leaves can be trained: {path!r} is {leaf}")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"what is trained itself starts from values: {path!r} is {leaf}")
    if rows and (not leaf.shape or rows[-1] >= leaf.shape[0]):
        raise ValueError(f"{path!r} of shape {leaf.shape} has no row {rows[-1]}")


def _part(targets: Targets, name: str, path: str, sites: Sites) -> parts.Part | None:
    """Return the part of the leaf at a path that a target means."""
    if isinstance(targets, str) or _contains(path, name):
        return None
    return parts.resolve(parts.parse(name)[1], sites.shapes[path])


def _in_layers(
    layers: Sequence[int], named: Iterable[tuple[str, parts.Part | None]], sites: Sites
) -> Iterator[tuple[str, parts.Part | None]]:
    """Yield what of the named weights and parts lies in some layers; each has to be somewhere."""
    found: set[int] = set()
    for path, part in named:
        stack, number = sites[path].stack, _layer(path)
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
        raise ValueError(f"the targets have no layers {missing}: they have {sorted(found)}")


def _layer(path: str) -> int | None:
    """Return the first number that ends a part of a path, None where there is none.

    >>> _layer("params/block_3/dense_1/kernel"), _layer("params/blocks/kernel")
    (3, None)
    """
    found = re.search(r"(?:^|/)(?:[^/]*[^/0-9])?([0-9]+)(?=/|$)", path)
    return int(found[1]) if found else None


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop of each run of following indices, which are in rising order.

    >>> _runs((0, 1, 2, 5))
    [(0, 3), (5, 6)]
    """
    starts = [i for i in indices if i - 1 not in indices]
    stops = [i + 1 for i in indices if i + 1 not in indices]
    return list(zip(starts, stops, strict=True))


def _cut(
    part: parts.Part | None, axis: int, bounds: tuple[int, int], shape: Sequence[int]
) -> parts.Part | None:
    """Return a part, with other bounds along one axis, of a weight of some shape."""
    cut = list(part or [None] * len(shape))
    cut[axis] = None if bounds == (0, shape[axis]) else bounds
    return tuple(cut) if any(cut) else None


def _target(config: LoRAConfig, path: str, part: parts.Part | None, shape: Any) -> Target:
    """Return a target with the rank and alpha that the patterns, or else the config, give it."""
    values: dict[str, Any] = {"rank_pattern": config.rank, "alpha_pattern": config.alpha}
    for field, default in values.items():
        pattern = getattr(config, field)
        keys = [key for key in pattern if _means(key, path, part, shape)]
        if len(keys) > 1:
            raise ValueError(f"{field} must name {parts.name(path, part)!r} once: got {keys}")
        values[field] = pattern[keys[0]] if keys else default
    rank, alpha = values.values()
    return Target(path, part, rank, config.plain_alpha(alpha, rank))


def _means(key: str, path: str, part: parts.Part | None, shape: Any) -> bool:
    """Tell whether a key of a pattern is a name, or the expression, of a path or of a part."""
    if parts.is_part(key):
        name, text = parts.parse(key)
        return _contains(path, name) and parts.resolve(text, shape) == part
    return _contains(path, key) or bool(re.fullmatch(key, path))


def _check_patterns(config: LoRAConfig, chosen: list[Target], shapes: dict[str, Any]) -> None:
    """Raise if a pattern names something that is not adapted."""
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(_means(key, *t[:2], shapes[t.path]) for t in chosen):
                near = paths.nearest(key, [target.path for target in chosen])
                raise ValueError(f"{field} names {key!r}, which is no target; {near}")


def _check_parts(chosen: list[Target], sites: Sites) -> None:
    """Raise if a part is smaller than its rank, or two parts of one weight overlap."""
    for path, part, rank, _ in sorted(chosen, key=str):
        shape = parts.shape(part, sites.shapes[path])
        if rank > (side := sites[path].roles.max_rank(shape)):
            raise ValueError(
                f"rank {rank} is too large for {parts.name(path, part)!r} of shape {shape}: "
                f"its smaller side is {side}"
            )
        for other in (t.part for t in chosen if t.path == path and t.part != part):
            if parts.overlap(part, other):
                names = f"{parts.name(path, part)!r} and {parts.name(path, other)!r}"
                raise ValueError(f"the targets {names} overlap: one element has one adapter")


def _matched(
    targets: Targets, word: str, sites: Sites, *, only_sites: bool = False
) -> list[tuple[str, str]]:
    """Return targets with each path they match; each has to match one, if asked a site."""
    matched = []
    for name, found in matches(targets, sites.shapes).items():
        if not found:
            near = paths.nearest(name, sites.sites if only_sites else sites.shapes)
            raise ValueError(f"{word} {name!r} matches no leaf; {near}")
        usable = [path for path in found if path in sites] if only_sites else found
        if not usable:
            why = "; ".join(f"{path!r}: {sites.skipped[path]}" for path in found[:3])
            near = paths.nearest(name, sites.sites)
            raise ValueError(
                f"{word} {name!r} matches no leaf that a supported operation consumes ({why}); "
                f"nearest sites: {near.removeprefix('nearest: ')}"
            )
        matched += [(name, path) for path in usable]
    return matched
