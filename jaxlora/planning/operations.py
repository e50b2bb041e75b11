"""The operations of a program: those of its products and convolutions, loops in full.

A product of ``(m, k)`` with ``(k, n)`` is ``2 m k n`` operations, a convolution two for each
element of its result, input channel and place in its window, those on zeros of padding and
dilation included. Nothing else is counted: what is done to each element costs little
beside products. XLA's own count has that too, and the body of a loop once, however often it runs.
"""

import math

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Eqn, Jaxpr, Traced


def count(jaxpr: Traced, platform: str) -> int:
    """Return the operations of the products of one run of a program.

    A scan counts as often as it runs, a loop of unknown length once. Of branches the dearest
    counts, and of those for platforms the one that runs. What no output needs is left out. The
    program of a `jax.shard_map` counts for each device that runs it.

    Args:
        jaxpr: the program.
        platform: what it is compiled for, as ``"cpu"``.
    """
    return _count(compat.alive(jaxpr), platform)


def _count(program: Jaxpr, platform: str) -> int:
    return sum(_of_equation(eqn, platform) for eqn in program.eqns)


def _of_equation(eqn: Eqn, platform: str) -> int:
    known = registry.primitive(eqn)
    if known.is_product:
        return known.flops(eqn)
    inner = [_count(compat.opened(jaxpr), platform) for jaxpr in compat.inner_jaxprs(eqn)]
    if not inner:
        return 0
    match eqn.primitive.name:
        case "cond":
            return _of_branches(inner, eqn.params.get("branches_platforms"), platform)
        case "shard_map":
            sizes = eqn.params["mesh"].shape
            return sum(inner) * math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    return sum(inner) * known.times(eqn)


def _of_branches(
    counts: list[int], platforms: tuple[tuple[str, ...] | None, ...] | None, platform: str
) -> int:
    """Return the operations of the branch that runs, or of the dearest that may.

    Args:
        counts: those of each branch.
        platforms: names of the platforms of each branch, None for all others; or None.
        platform: what is compiled for.
    """
    if platforms is None:
        return max(counts)
    pairs = [*zip(platforms, counts, strict=True)]
    named = [found for names, found in pairs if names and platform in names]
    return (named or [found for names, found in pairs if not names])[0]
