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

from jaxlora import initializers, paths
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
            a sequence of names, each a run of whole path parts.
        exclude: as targets, and wins over them.
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
    return targets


def _contains(path: str, name: str) -> bool:
    """Tell whether a name is a run of whole parts of a path."""
    return f"/{name.strip('/')}/" in f"/{path}/"


def matches(targets: Targets, candidates: Iterable[str]) -> dict[str, list[str]]:
    """Return for each target the paths it matches, in order; a regular expression is one target."""
    candidates = list(candidates)
    if isinstance(targets, str):
        return {targets: [path for path in candidates if re.fullmatch(targets, path)]}
    return {name: [path for path in candidates if _contains(path, name)] for name in targets}


def select(config: LoRAConfig, sites: Any) -> list[str]:
    """Return the paths to adapt, in the order of the tree.

    Args:
        config: the targets and the rank.
        sites: what `jaxlora.find_sites` found.

    Returns:
        Paths of sites, every one able to hold factors of the rank.

    Raises:
        ValueError: a target matches nothing, or no site; a named weight is smaller than the rank;
            nothing is left to adapt.
    """
    excluded = _matched(config.exclude, "exclude", sites) if config.exclude else set()
    if config.targets == ALL_LINEAR:
        chosen = {s.path for s in sites if not s.is_lookup and s.max_rank >= config.rank}
        chosen -= excluded
    else:
        chosen = _matched(config.targets, "target", sites, only_sites=True) - excluded
        for path in sorted(chosen):
            if config.rank > sites[path].max_rank:
                raise ValueError(
                    f"rank {config.rank} is too large for {path!r} of shape {sites[path].shape}: "
                    f"its smaller side is {sites[path].max_rank}"
                )
    if not chosen:
        raise ValueError(
            f"nothing to adapt: targets={config.targets!r} and exclude={config.exclude!r} leave "
            f"no site for rank {config.rank}; the leaves are:\n{sites}"
        )
    return [path for path in sites.shapes if path in chosen]


def _matched(targets: Targets, word: str, sites: Any, *, only_sites: bool = False) -> set[str]:
    """Return the paths that targets match; each target has to match one, if asked a site."""
    matched = set()
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
        matched.update(usable)
    return matched
