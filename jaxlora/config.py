"""The user's choices: how large, how strong, and where.

A target is a name (a run of whole path parts: ``"query"``, ``"mlp/up"``) or the one regular
expression that has to match whole paths. Every target must match; what matches nothing is a
mistake in the target, not a wish to adapt nothing.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxlora import initializers, parts, paths
from jaxlora.weight import scaling

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What to adapt and how.

    Attributes:
        rank: number of columns of ``a`` and rows of ``b``, at least 1.
        alpha: strength; the product ``a b`` is scaled by alpha / rank. Finite and positive.
        targets: ``"all-linear"`` (every matmul and convolution weight whose smaller side is at
            least the rank, no lookups), one regular expression (`re.fullmatch` on the path), or
            a sequence of names, each a run of whole path parts, with slices behind it for a part
            of the weight: ``"qkv/kernel[:, 0:64]"``.
        exclude: as targets, but whole weights alone, and wins over them.
        initializer: how ``a`` starts: ``"uniform"`` (±1/√in), ``"normal"``, ``"kaiming"``, or a
            function ``(key, (in, rank), dtype) -> array``.
        dtype: floating dtype of the factors.

    Raises:
        ValueError: rank below 1, alpha not finite and positive, no targets, a bad regular
            expression, an unknown initializer or a dtype that is not floating.
        TypeError: rank is not an int, targets are not strings.

    >>> import jaxlora
    >>> jaxlora.LoRAConfig(rank=8, alpha=16, targets=("query", "value")).scaling
    2.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Targets = ALL_LINEAR
    exclude: Targets = ()
    initializer: initializers.InitializerName | initializers.Initializer = "uniform"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, numbers.Integral):
            raise TypeError(f"rank must be an int: got {self.rank!r}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, numbers.Real):
            raise TypeError(f"alpha must be a number: got {self.alpha!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1: got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be finite and positive: got {self.alpha}")
        if not self.targets:
            raise ValueError(f"targets must name something to adapt: got {self.targets!r}")
        object.__setattr__(self, "targets", _checked(self.targets, "targets"))
        object.__setattr__(self, "exclude", _checked(self.exclude, "exclude"))
        if not callable(self.initializer) and self.initializer not in initializers.NAMED:
            raise ValueError(
                f"initializer must be a function or one of {sorted(initializers.NAMED)}: "
                f"got {self.initializer!r}"
            )
        object.__setattr__(self, "rank", int(self.rank))
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype of the factors must be floating: got {self.dtype}")

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product, alpha / rank."""
        return scaling(self.alpha, self.rank)


def _checked(targets: Targets, field: str) -> Targets:
    """Return targets in a hashable form, or raise for what is no target."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"{field} is no regular expression: {error}: got {targets!r}"
            ) from error
        return targets
    if not isinstance(targets, Iterable):
        raise TypeError(f"{field} must be strings: got {targets!r}")
    targets = tuple(targets)
    for name in targets:
        if not isinstance(name, str):
            raise TypeError(f"{field} must be strings: got {name!r}")
        if not name.strip("/"):
            raise ValueError(f"{field} must be runs of path parts, as 'query': got {name!r}")
        if field == "exclude" and parts.parse(name)[1] is not None:
            raise ValueError(f"exclude must name whole weights: got {name!r}")
    return targets


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


def select(config: LoRAConfig, sites: Any) -> list[tuple[str, parts.Part | None]]:
    """Return the paths to adapt, each with its part, in the order of the tree.

    Args:
        config: the targets and the rank.
        sites: what `jaxlora.find_sites` found.

    Returns:
        Paths of sites and parts of them, every one able to hold factors of the rank.

    Raises:
        ValueError: a target matches nothing, or no site; a named weight is smaller than the rank;
            two parts of a weight overlap; nothing is left to adapt.
    """
    excluded = {p for _, p in _matched(config.exclude, "exclude", sites)} if config.exclude else ()
    if config.targets == ALL_LINEAR:
        fit = [s.path for s in sites if not s.is_lookup and s.max_rank >= config.rank]
        chosen = {(path, None) for path in fit if path not in excluded}
    else:
        matched = _matched(config.targets, "target", sites, only_sites=True)
        chosen = {
            (path, _part(config.targets, name, path, sites))
            for name, path in matched
            if path not in excluded
        }
        _check_parts(config.rank, chosen, sites)
    if not chosen:
        raise ValueError(
            f"nothing to adapt: targets={config.targets!r} and exclude={config.exclude!r} leave "
            f"no site for rank {config.rank}; the leaves are:\n{sites}"
        )
    order = {path: i for i, path in enumerate(sites.shapes)}
    return sorted(chosen, key=lambda target: (order[target[0]], parts.name(*target)))


def _part(targets: Targets, name: str, path: str, sites: Any) -> parts.Part | None:
    """Return the part of the leaf at a path that a target means."""
    if isinstance(targets, str) or _contains(path, name):
        return None
    return parts.resolve(parts.parse(name)[1], sites.shapes[path])


def _check_parts(rank: int, chosen: Iterable[tuple[str, parts.Part | None]], sites: Any) -> None:
    """Raise if a part is smaller than the rank, or two parts of one weight overlap."""
    for path, part in sorted(chosen, key=str):
        shape = parts.shape(part, sites.shapes[path])
        if rank > (side := sites[path].roles.max_rank(shape)):
            raise ValueError(
                f"rank {rank} is too large for {parts.name(path, part)!r} of shape {shape}: "
                f"its smaller side is {side}"
            )
        for other in (p for of, p in chosen if of == path and p != part):
            if parts.overlap(part, other):
                names = f"{parts.name(path, part)!r} and {parts.name(path, other)!r}"
                raise ValueError(f"the targets {names} overlap: one element has one adapter")


def _matched(
    targets: Targets, word: str, sites: Any, *, only_sites: bool = False
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
