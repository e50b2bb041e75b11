"""PEFT's vocabulary: its names for what `jaxlora.algebra` has objects for."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import jax

from jaxlora import algebra
from jaxlora.messages import checks
from jaxlora.weights.adapters import Adapters

CombinationType = Literal[
    "cat",
    "svd",
    "linear",
    "magnitude_prune",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune_svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
]
MajoritySignMethod = Literal["total", "frequency"]

__all__ = ["CombinationType", "MajoritySignMethod", "combine"]

# for each name the method, or the rule of `jaxlora.algebra.Svd`, and whether it is one of that
_METHODS: Mapping[str, tuple[Any, bool]] = MappingProxyType(
    {
        "cat": (algebra.Concatenation, False),
        "svd": (None, True),
        "linear": (algebra.Linear, False),
        "magnitude_prune": (algebra.MagnitudePruning, False),
        "ties": (algebra.Ties, False),
        "dare_linear": (algebra.DareLinear, False),
        "dare_ties": (algebra.DareTies, False),
        "magnitude_prune_svd": (algebra.MagnitudePruning, True),
        "ties_svd": (algebra.Ties, True),
        "dare_linear_svd": (algebra.DareLinear, True),
        "dare_ties_svd": (algebra.DareTies, True),
    }
)


def combine(
    adapters: Sequence[Adapters],
    weights: Sequence[float],
    combination_type: CombinationType = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySignMethod = "total",
    key: jax.Array | None = None,
) -> Adapters:
    """Return one set of adapters for several, as PEFT's ``add_weighted_adapter`` does.

    Args:
        adapters: sets of factors by path.
        weights: one for each set, finite; may be negative.
        combination_type: ``"cat"`` is `jaxlora.algebra.Concatenation`, ``"svd"``
            `jaxlora.algebra.Svd`, the others are the rules of `jaxlora.algebra`, for factors, or
            those that end in ``"_svd"`` for products.
        svd_rank: rank of the result, for ``"svd"`` and ``"..._svd"``; default the largest.
        density: share of the elements that is kept, for all that prune.
        majority_sign_method: whose sign wins, for ``"..ties.."``.
        key: random key, for ``"dare_.."``. PEFT draws with torch's generator, and other elements.

    Returns:
        Factors by path, with scaling 1.

    Raises:
        TypeError: as of `jaxlora.algebra.combine` and its methods.
        ValueError: so too, or an argument that the combination type needs is missing, or one that
            it does not use is given.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> from jaxlora.formats import peft
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> peft.combine([adapters, adapters], [0.7, 0.3], "ties", density=0.5)
    {'w': Adapter(a=(4, 1), b=(1, 3), alpha=1)}
    """
    checks.check_choice(combination_type, "combination_type", tuple(_METHODS))
    checks.check_choice(majority_sign_method, "majority_sign_method", get_args(MajoritySignMethod))
    made, has_rank = _METHODS[combination_type]
    used = {field.name for field in dataclasses.fields(made)} if made else set()
    frequency = None if majority_sign_method == "total" else majority_sign_method
    options = {
        "svd_rank": (svd_rank, has_rank, False),
        "density": (density, "density" in used, True),
        "majority_sign_method": (frequency, "majority" in used, False),
        "key": (key, "key" in used, True),
    }
    for name, (value, is_used, is_needed) in options.items():
        if value is not None and not is_used:
            raise ValueError(
                f"the combination type {combination_type!r} does not use {name}: "
                f"got {checks.shown(value)}"
            )
        if value is None and is_used and is_needed:
            raise ValueError(f"the combination type {combination_type!r} needs {name}: got None")
    fields = {"density": density, "majority": majority_sign_method, "key": key}
    method = made and made(**{name: fields[name] for name in used})
    return algebra.combine(adapters, weights, algebra.Svd(method, svd_rank) if has_rank else method)
