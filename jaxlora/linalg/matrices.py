"""Weights and the factors of adapters as matrices, one for each entry of a stack, and back."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxlora.linalg import meshes, svd
from jaxlora.types import Leaf
from jaxlora.weights import sharding, tree_checks
from jaxlora.weights.adapters import Adapter, Replacement, merge_dtype
from jaxlora.weights.roles import Roles


def check_linear(adapters: Mapping[str, Adapter | Replacement]) -> dict[str, Adapter]:
    """Return adapters, or raise if one changes a weight by more than a product of factors."""
    tree_checks.check_adapters(adapters)
    found = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, Replacement):
            raise ValueError(f"the leaf {path!r} is trained whole, and has no product of factors")
        if adapter.magnitude is not None:
            raise ValueError(
                f"the adapter of {path!r} has a magnitude, so that what it adds is no multiple of "
                "its product: merge it instead"
            )
        found[path] = adapter
    return found


def factors(adapter: Adapter) -> tuple[jax.Array, jax.Array]:
    """Return ``a (stack, in, rank)`` and ``b (stack, rank, out)``, in float32 or wider."""
    a, b = factors_by_entry(adapter)
    return a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])


def factors_by_entry(adapter: Adapter) -> tuple[jax.Array, jax.Array]:
    """Return ``a (*stack, in, rank)`` and ``b (*stack, rank, out)``, in the dtype of `factors`."""
    stack, rank = adapter.a.shape[: len(adapter.roles.stack)], adapter.rank
    in_, out = (math.prod(x.shape) // (math.prod(stack) * rank) for x in (adapter.a, adapter.b))
    dtype = merge_dtype(adapter.a.dtype)
    a = adapter.a.reshape(*stack, in_, rank).astype(dtype)
    return a, adapter.b.reshape(*stack, rank, out).astype(dtype)


def of_weight(weight: jax.Array, roles: Roles) -> jax.Array:
    """Return a weight ``(stack, in, out)`` in float32, or wider for wider."""
    found = by_entry(weight, roles)
    return found.reshape(-1, *found.shape[-2:])


def by_entry(weight: jax.Array, roles: Roles) -> jax.Array:
    """Return a weight ``(*stack, in, out)`` in float32, or wider for wider."""
    stack, in_, out = roles.sizes(weight.shape)
    order = (*roles.stack, *roles.in_, *roles.out)
    whole = weight.astype(merge_dtype(weight.dtype)).transpose(order)
    return whole.reshape(*stack, math.prod(in_), math.prod(out))


def from_adapters(make: Callable[..., Adapter], adapters: Sequence[Adapter]) -> Adapter:
    """Return the adapter that a function makes of a sequence of them, on a mesh of any kind.

    It is where the first of them is.
    """
    made, first = meshes.run(make, ([*adapters],)), adapters[0]
    return dataclasses.replace(made, a=_placed(made.a, first.a), b=_placed(made.b, first.b))


def adapter_of(adapter: Adapter, a: jax.Array, b: jax.Array) -> Adapter:
    """Return the adapter with factors from `factors`, of any rank, and scaling 1."""
    count, rank = len(adapter.roles.stack), a.shape[-1]
    a = a.reshape(*adapter.a.shape[:-1], rank).astype(adapter.a.dtype)
    stack, out = adapter.b.shape[:count], adapter.b.shape[count + 1 :]
    b = b.reshape(*stack, rank, *out).astype(adapter.b.dtype)
    a, b = (_placed(x, like) for x, like in ((a, adapter.a), (b, adapter.b)))
    return dataclasses.replace(adapter, a=a, b=b, alpha=float(rank))


def _placed(x: jax.Array, like: Leaf) -> jax.Array:
    """Return x where another array is; that of a factor holds for any rank."""
    known = sharding.concrete(like)
    return x if known is None else jax.device_put(x, known)


def adapter_of_svd(adapter: Adapter, decomposed: svd.SVD, times: float = 1.0) -> Adapter:
    """Return the adapter with factors from singular values times a number."""
    return adapter_of(adapter, *svd.factors(decomposed, 1 / times))
