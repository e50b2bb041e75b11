"""Which axes of a weight are a stack where the user says so.

A program that multiplies every token with every expert, ``einsum("td,edf->tef", x, w)``, does not
tell that its experts are a stack: they may as well be so many more columns of one weight, and get
one ``a`` for all. Where the user names the axes, each entry gets factors of its own, as it does in
a loop over experts, a scan or a ragged product.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxlora.targets import patterns
from jaxlora.targets.sites import Site, Sites
from jaxlora.weights import paths
from jaxlora.weights.roles import Roles


def with_stacks(sites: Sites, stack: Mapping[str, Sequence[int]]) -> Sites:
    """Return sites of which some have the stack axes that the user names, and no others.

    Args:
        sites: what `jaxlora.find_sites` found.
        stack: axes by name, or by regular expression for whole paths.

    Raises:
        ValueError: a name is of no site, or one site has two; there is no such axis; or no axis is
            left for one of the factors.
    """
    found: dict[str, str] = {}
    for name in stack:
        named = [path for path in sites.sites if patterns.means(name, path, None, ())]
        if not named:
            near = paths.nearest(name, sites.sites)
            raise ValueError(f"stack names {name!r}, which is no site; {near}")
        for path in named:
            if found.setdefault(path, name) != name:
                raise ValueError(f"stack must name {path!r} once: got {name!r} and {found[path]!r}")
    changed = {
        path: dataclasses.replace(sites[path], roles=_roles(sites[path], tuple(stack[name])))
        for path, name in found.items()
    }
    return dataclasses.replace(sites, sites=sites.sites | changed)


def _roles(site: Site, stack: tuple[int, ...]) -> Roles:
    """Return the roles of a site with another stack; what was one and is not is out."""
    if stack and stack[-1] >= len(site.shape):
        raise ValueError(
            f"stack must name axes of {site.path!r} of shape {site.shape}: got {stack}"
        )
    in_ = tuple(axis for axis in site.in_ if axis not in stack)
    out = tuple(axis for axis in sorted((*site.stack, *site.out)) if axis not in stack)
    if not in_ or not out:
        raise ValueError(
            f"stack={stack} leaves {site.path!r} of shape {site.shape} no "
            f"{'in' if not in_ else 'out'} axis: the program has in={site.in_}, out={site.out}"
        )
    return Roles(stack, in_, out)
