"""Restrict an optimizer to the factors.

Optax is imported where it is used, so that importing this library takes little more than JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jaxlora.trees import mask

if TYPE_CHECKING:
    import optax


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Restrict an optimizer to the factors: everything else gets an update of exact zero.

    The optimizer sees the factors alone, so it holds no state for the base, and a clip by global
    norm or a weight decay concerns the factors alone.

    Args:
        tx: an optax transform that needs gradients and parameters alone, not the loss.

    Returns:
        A transform for trees with `LoRAWeight` nodes, or for adapters from `jaxlora.split`.

    Raises:
        ValueError: at ``init``, a tree without factors.

    >>> import jax, jax.numpy as jnp, jaxlora, optax
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> tx = jaxlora.freeze(optax.sgd(1.0))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> float(abs(updates["w"].base).max()), float(updates["w"].b.min())
    (0.0, -1.0)
    """
    import optax

    factors_only = optax.chain(
        optax.masked(tx, mask), optax.masked(optax.set_to_zero(), _not_factors)
    )

    def init(params):
        if not any(jax.tree.leaves(mask(params))):
            raise ValueError("the tree has no factors to train: make some with jaxlora.init")
        return factors_only.init(params)

    return optax.GradientTransformationExtraArgs(init, factors_only.update)


def _not_factors(params: Any) -> Any:
    return jax.tree.map(lambda is_factor: not is_factor, mask(params))
