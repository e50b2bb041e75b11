"""Say which weights a choice of targets leaves out, and why: none is skipped in silence."""

from collections.abc import Iterator

from jaxlora.messages import checks, table
from jaxlora.targets import patterns
from jaxlora.targets.config import LoRAConfig
from jaxlora.targets.sites import RETURNED, UNUSED, Sites, is_matrix
from jaxlora.types import PyTree
from jaxlora.weights import paths


class SkippedWeightWarning(UserWarning):
    """The targets leave out weights that cannot be adapted, or only when they are named."""


def warn_of_skipped(config: LoRAConfig, sites: Sites, params: PyTree) -> None:
    """Warn once of the floating weights of two or more axes that the targets leave out.

    With ``"all-linear"`` that is every one that ``exclude`` does not name, with names every one
    that a target matches; in the layers, where they are chosen. A stack is as many axes less.
    Biases, states as statistics and caches, and what is trained otherwise, are not left out.

    Args:
        config: what to adapt.
        sites: what `jaxlora.find_sites` found.
        params: the parameters, adapted and trained as the config says.
    """
    leaves, _ = paths.flatten(params)
    states = paths.states(params)
    rows = [
        (path, str(sites.shapes[path]), why)
        for path in _wanted(config, sites)
        if not paths.is_trained(leaves[path]) and path not in states and (why := _why(path, sites))
    ]
    if not rows:
        return
    lines = [
        f"  {path} {shape}{f' x{count}' if count > 1 else ''}: {why}"
        for path, count, (shape, why) in table.fold(rows)
    ]
    some = "1 weight" if len(rows) == 1 else f"{len(rows)} weights"
    checks.warn(
        f"targets={config.targets!r} leaves out {some} of two or more axes:\n"
        + "\n".join(lines)
        + "\nto adapt one, name its whole path in targets, also beside 'all-linear' (what is not "
        "used cannot be adapted); to leave it out without this warning, name it in exclude",
        SkippedWeightWarning,
    )


def _wanted(config: LoRAConfig, sites: Sites) -> Iterator[str]:
    """Yield the leaves that the config asks to adapt, whether or not they can be."""
    takes_all, names = patterns.without_all(config.targets)
    named = patterns.matched(names, sites.shapes)
    excluded = patterns.matched(config.exclude, sites.shapes)
    for path in sites.shapes:
        found = sites.sites.get(path) or sites.dense.get(path)
        stack = found.stack if found else ()
        in_layers = config.layers is None or patterns.is_in_layers(path, stack, config.layers)
        if in_layers and path not in excluded and (takes_all or path in named):
            yield path


def _why(path: str, sites: Sites) -> str:
    """Return why a leaf is not adapted, nothing for one that is no weight of two axes."""
    if path in sites:
        site = sites[path]
        if len(site.in_) + len(site.out) < 2:
            return ""
        small = f"its smaller side, {site.max_rank}, is below the rank"
        return "it is looked up" if site.is_looked_up else small
    why = sites.skipped[path]
    if path in sites.dense:
        return f"{why}, which no low-rank rule covers: by name it runs dense"
    return why if why in (UNUSED, RETURNED) and is_matrix(sites.shapes[path]) else ""
