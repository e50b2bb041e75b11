"""Steps that do not depend on how a product is shared out between its factors."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxlora.linalg import matrices
from jaxlora.linalg.precise import matmul
from jaxlora.messages import checks
from jaxlora.optim.factor_names import check_has_params, init_stateless
from jaxlora.weights import paths, sharding
from jaxlora.weights.adapters import Adapter
from jaxlora.weights.nodes import LoRAWeight

if TYPE_CHECKING:
    import optax


def precondition(damping: float = 1e-6) -> optax.GradientTransformation:
    """Precondition the gradient of each factor by the other, a Riemannian metric of the product.

    ``da (b b^T + damping)^-1`` and ``(a^T a + damping)^-1 db`` (Zhang and Pilanci 2024,
    arXiv:2402.02347, algorithm 1), computed in float32. Up to the damping the step of the product
    ``a b`` is then the same for any factors of it. It stands before the optimizer.

    Args:
        damping: added to the diagonal of the two matrices of size (rank, rank), positive.

    Raises:
        ValueError: damping is not finite and positive; at ``init``, a tree without factors; at
            ``update``, no params.
        TypeError: at ``init``, the factors of an NNX module, which do not tell their axes, or
            factors of which only one is trained.
    """
    import optax

    checks.check_number(damping, "damping", "finite and positive")

    def init(params):
        state = init_stateless(params)
        leaves = jax.tree.leaves(params, is_leaf=paths.is_node)
        adapters = [x for leaf in leaves for x in getattr(leaf, "terms", (leaf,))]
        adapters = [adapter for adapter in adapters if isinstance(adapter, Adapter)]
        if not adapters:
            raise TypeError("precondition needs Adapters or LoRAWeights, which tell their axes")
        if not all(hasattr(x, "shape") for adapter in adapters for x in (adapter.a, adapter.b)):
            raise TypeError("precondition needs both factors: one of them is not trained")
        return state

    def preconditioned(leaf, gradient):
        if isinstance(leaf, LoRAWeight):
            terms = map(preconditioned, leaf.terms, gradient.terms)
            return dataclasses.replace(gradient, terms=tuple(terms))
        if not isinstance(leaf, Adapter):
            return gradient
        solve = functools.partial(_solved, damping=damping)
        placed = {"a": sharding.explicit(gradient.a), "b": sharding.explicit(gradient.b)}
        if any(placed.values()):  # what is contracted may be sharded: the compiler decides
            solve = jax.jit(jax.sharding.auto_axes(solve, out_sharding=placed))
        return dataclasses.replace(gradient, **solve(leaf, gradient))

    def update(updates, state, params=None):
        check_has_params(params)
        return jax.tree.map(preconditioned, params, updates, is_leaf=paths.is_node), state

    return optax.GradientTransformation(init, update)


def _solved(leaf: Adapter, gradient: Adapter, damping: float) -> dict[str, jax.Array]:
    """Return the gradients of the two factors, each preconditioned by the other."""
    a, b = matrices.factors(leaf)
    da, db = matrices.factors(gradient)
    identity = damping * jnp.eye(leaf.rank, dtype=a.dtype)[None]
    da = jnp.linalg.solve(matmul(b, b.mT) + identity, da.mT).mT
    db = jnp.linalg.solve(matmul(a.mT, a) + identity, db)
    shaped = {"a": da.reshape(leaf.a.shape), "b": db.reshape(leaf.b.shape)}
    return {name: x.astype(getattr(gradient, name).dtype) for name, x in shaped.items()}
