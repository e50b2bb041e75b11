"""Several sets of adapters as one, as PEFT's ``add_weighted_adapter``."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxlora.algebra import embedding, rules
from jaxlora.algebra.rules import Majority, Rule
from jaxlora.linalg import matrices, svd
from jaxlora.messages import checks
from jaxlora.weights.adapters import Adapter, Adapters

Method = (
    Rule
    | Literal["cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
)
METHODS = tuple(name for group in get_args(Method) for name in get_args(group))


def add(*adapters: Adapters) -> Adapters:
    """Return adapters whose products are the sums of those given, their ranks added up."""
    return combine(adapters, [1.0] * len(adapters))


def combine(
    adapters: Sequence[Adapters],
    weights: Sequence[float],
    method: Method = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: Majority | None = None,
    key: jax.Array | None = None,
) -> Adapters:
    """Return one set of adapters for several, as PEFT's ``add_weighted_adapter``.

    - ``"cat"``: the weighted sum of the products, exactly; ranks add up.
    - ``"svd"``: the nearest to that sum of a rank.
    - ``"linear"``: factors are summed, ``a`` and ``b`` apart, each times the square root of weight
      and scaling: a rough approximation of the sum of products, but of the same rank.
    - ``"magnitude_prune"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"``: the same, of
      pruned factors, see `jaxlora.algebra.rules`.
    - the same with ``"_svd"``: the products are pruned and summed, dense, and what is nearest to
      that of a rank is taken.

    A path that only some of the adapters have is combined from those. Adapters of parts of a
    weight that overlap without being equal, or of a part and of all of it, become adapters of the
    smallest block around them.

    Args:
        adapters: sets of factors by path.
        weights: one for each set, finite; may be negative.
        method: how they are combined.
        rank: of the result, for ``"svd"`` and ``"..._svd"``; default the largest of the ranks.
        density: share of the elements that pruning keeps, in (0, 1].
        majority: for ``"..ties"``, whether the sign of the sum (``"total"``, the default) or that
            of more elements (``"frequency"``) wins.
        key: random key, for ``"dare_..."``.

    Returns:
        Factors by path, with scaling 1.

    Raises:
        TypeError: adapters is one set, a value in a set no adapter, weights no numbers, rank no
            int, density no number, or key no random key.
        ValueError: an argument that the method needs is missing, one that it does not use is
            given, adapters of one path are for different weights, or differ in rank where factors
            are summed.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> jaxlora.algebra.combine([adapters, adapters], [0.7, 0.3])
    {'w': Adapter(a=(4, 2), b=(2, 3), alpha=2)}
    """
    if not checks.is_listing(adapters) or isinstance(adapters, Set):
        got = "one set, a dict" if isinstance(adapters, Mapping) else checks.shown(adapters)
        raise TypeError(f"adapters must be a sequence of sets of adapters: got {got}")
    adapters, weights = list(adapters), checks.check_numbers(weights, "weights")
    _check(adapters, weights, method, rank, density, majority, key)
    found: dict[str, list[tuple[Adapter, float]]] = {}
    linear = [matrices.check_linear(group) for group in adapters]
    for group, weight in zip(embedding.disjoint(linear), weights, strict=True):
        for path, several in group.items():
            found.setdefault(path, []).append((_summed(path, several), weight))
    keys = [None] * len(found) if key is None else jax.random.split(key, len(found))
    how = (1.0 if density is None else density, majority or "total")
    return {
        path: _combined(path, pairs, method, rank, how, k)
        for (path, pairs), k in zip(found.items(), keys, strict=True)
    }


def _check(adapters, weights, method, rank, density, majority, key) -> None:
    """Raise for arguments that do not go together."""
    checks.check_choice(method, "method", METHODS)
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"there must be one weight for each of at least one set of adapters: got "
            f"{len(adapters)} sets and {len(weights)} weights"
        )
    prunes = method not in ("linear", "cat", "svd")
    for name, value, used, needed in (
        ("rank", rank, method.endswith("svd"), False),
        ("density", density, prunes, prunes),
        ("majority", majority, "ties" in method, False),
        ("key", key, method.startswith("dare"), method.startswith("dare")),
    ):
        if value is None and needed:
            raise ValueError(f"the method {method!r} needs {name}: got None")
        if value is not None and not used:
            raise ValueError(
                f"the method {method!r} does not use {name}: got {checks.shown(value)}"
            )
    if rank is not None:
        checks.check_count(rank, "rank")
    if density is not None:
        checks.check_number(density, "density", "in (0, 1]")
    if majority is not None:
        checks.check_choice(majority, "majority", get_args(Majority))
    if key is not None:
        checks.check_key(key, "combine(adapters, weights, method, key=key)")


def _summed(path: str, adapters: Sequence[Adapter]) -> Adapter:
    """Return the sum of the adapters that one set has for what is one block in another."""
    if len(adapters) == 1:
        return adapters[0]
    return _combined(path, [(adapter, 1.0) for adapter in adapters], "cat", None, (1.0, "total"))


def _combined(
    path: str,
    pairs: Sequence[tuple[Adapter, float]],
    method: Method,
    rank: int | None,
    how: tuple[float, Majority],
    key: jax.Array | None = None,
) -> Adapter:
    """Return one adapter for several of one weight."""
    first, ranks = pairs[0][0], [adapter.rank for adapter, _ in pairs]
    factors = [matrices.of(adapter) for adapter, _ in pairs]
    weights = [weight for _, weight in pairs]
    scalings = [adapter.scaling for adapter, _ in pairs]
    scaled = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    if method in ("cat", "svd"):
        a = jnp.concatenate([w * a for w, (a, _) in zip(scaled, factors, strict=True)], -1)
        b = jnp.concatenate([b for _, b in factors], -2)
        if method == "cat":
            return matrices.adapter_of(first, a, b)
        return matrices.adapter_of_svd(first, svd.of_product(a, b, rank or max(ranks)))
    rule: Any = method.removesuffix("_svd")
    if rule != method:
        products = [s * (a @ b) for s, (a, b) in zip(scalings, factors, strict=True)]
        total = _each_entry(products, weights, rule, how, key)
        return matrices.adapter_of_svd(first, svd.truncated(total, rank or max(ranks)))
    if len(set(ranks)) > 1:
        raise ValueError(f"the method {method!r} needs equal ranks: {path!r} has {ranks}")
    roots = [math.sqrt(abs(weight)) for weight in scaled]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
    keys = (None, None) if key is None else tuple(jax.random.split(key))
    a = _each_entry([a for a, _ in factors], signed, rule, how, keys[0])
    b = _each_entry([b for _, b in factors], roots, rule, how, keys[1])
    return matrices.adapter_of(first, a, b)


def _each_entry(
    stacks: Sequence[jax.Array], weights: Sequence[float], rule: Rule, how: Any, key: Any
) -> jax.Array:
    """Return `rules.combined` of each entry of stacks of matrices."""
    keys = None if key is None else jax.random.split(key, len(stacks[0]))
    return jax.vmap(
        lambda arrays, key: rules.combined(arrays, weights, rule, *how, key=key),
        in_axes=(0, None if key is None else 0),
    )(list(stacks), keys)
