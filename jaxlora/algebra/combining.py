"""Several sets of adapters as one."""

from collections.abc import Mapping, Sequence, Set

import jax
import jax.numpy as jnp

from jaxlora.algebra import embedding
from jaxlora.algebra.methods import Concatenation, Method
from jaxlora.linalg import matrices
from jaxlora.messages import checks
from jaxlora.weights.adapters import Adapter, Adapters

_EXACT = Concatenation()


def add(*adapters: Adapters) -> Adapters:
    """Return adapters whose products are the sums of those given, their ranks added up."""
    return combine(adapters, [1.0] * len(adapters))


def combine(
    adapters: Sequence[Adapters], weights: Sequence[float], method: Method = _EXACT
) -> Adapters:
    """Return one set of adapters for several.

    - `Concatenation`, the default: the weighted sum of the products, exactly; ranks add up.
    - `Svd`: the nearest to that sum of a rank, or, with a rule, to what the rule makes of the dense
      products.
    - A rule for the factors, which is rough and keeps the rank: `Linear` sums them,
      `MagnitudePruning`, `Ties`, `DareLinear` and `DareTies` prune them before.

    These are the methods of PEFT's ``add_weighted_adapter``; `jaxlora.formats.peft.combine` takes
    its names for them.

    A path that only some of the adapters have is combined from those. Adapters of parts of a
    weight that overlap without being equal, or of a part and of all of it, become adapters of the
    smallest block around them.

    Args:
        adapters: sets of factors by path.
        weights: one for each set, finite; may be negative.
        method: how they are combined.

    Returns:
        Factors by path, with scaling 1.

    Raises:
        TypeError: adapters is one set, a value in a set no adapter, weights no numbers, or method
            no method.
        ValueError: there is not one weight for each set, adapters of one path are for different
            weights, or differ in rank where factors are summed.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> jaxlora.algebra.combine([adapters, adapters], [0.7, 0.3])
    {'w': Adapter(a=(4, 2), b=(2, 3), alpha=2)}
    >>> ties = jaxlora.algebra.Ties(density=0.5)
    >>> jaxlora.algebra.combine([adapters, adapters], [0.7, 0.3], ties)
    {'w': Adapter(a=(4, 1), b=(1, 3), alpha=1)}
    """
    if not checks.is_listing(adapters) or isinstance(adapters, Set):
        got = "one set, a dict" if isinstance(adapters, Mapping) else checks.shown(adapters)
        raise TypeError(f"adapters must be a sequence of sets of adapters: got {got}")
    adapters, weights = list(adapters), checks.check_numbers(weights, "weights")
    if not isinstance(method, Method):
        raise TypeError(
            "method must be one of jaxlora.algebra, as Ties(density=0.5): "
            f"got {checks.shown(method)}"
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"there must be one weight for each of at least one set of adapters: got "
            f"{len(adapters)} sets and {len(weights)} weights"
        )
    found: dict[str, tuple[list[Adapter], list[float]]] = {}
    linear = [matrices.check_linear(group) for group in adapters]
    for group, weight in zip(embedding.disjoint(linear), weights, strict=True):
        for path, several in group.items():
            ones, scales = found.setdefault(path, ([], []))
            ones.append(_summed(path, several))
            scales.append(weight)
    return {path: _as_one(path, *several, method) for path, several in found.items()}


def _as_one(
    path: str, adapters: Sequence[Adapter], weights: Sequence[float], method: Method
) -> Adapter:
    """Return the one adapter that a method makes of several, in a dtype that holds those of all."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*(x.dtype for one in adapters for x in (one.a, one.b)))
    alike = [jax.tree.map(lambda x: x.astype(dtype), one) for one in adapters]
    return matrices.from_adapters(lambda several: method.adapter(path, several, weights), alike)


def _summed(path: str, adapters: Sequence[Adapter]) -> Adapter:
    """Return the sum of the adapters that one set has for what is one block in another."""
    if len(adapters) == 1:
        return adapters[0]
    return _as_one(path, adapters, [1.0] * len(adapters), _EXACT)
