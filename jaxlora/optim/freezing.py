"""Restrict an optimizer to the factors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxlora.messages import checks
from jaxlora.optim.factor_names import check_some, factor_names
from jaxlora.types import PyTree
from jaxlora.weights import modules
from jaxlora.weights.adapters import FACTORS

if TYPE_CHECKING:
    import optax


def freeze(
    tx: optax.GradientTransformation, *, train: Sequence[str] = FACTORS
) -> optax.GradientTransformationExtraArgs:
    """Restrict an optimizer to the factors: everything else gets an update of exact zero.

    The optimizer sees the factors alone, so it holds no state for the base, and a clip by global
    norm or a weight decay concerns the factors alone.

    Args:
        tx: an optax transform that needs gradients and parameters alone, not the loss.
        train: names of those that are trained, of ``"a"``, ``"b"``, ``"magnitude"`` and, for leaves
            that are trained whole, ``"value"``. With ``("b",)`` this is LoRA-FA (Zhang et al. 2023,
            arXiv:2308.03303): under `jax.jit` no gradient of ``a`` is computed, and the inputs of
            the layers are not kept for it.

    Returns:
        A transform for trees with `LoRAWeight` nodes, for adapters from `jaxlora.split`, or for the
        factors of a `jaxlora.nnx.Adapted`.

    Raises:
        ValueError: train names nothing, or what is no factor; at ``init``, a tree without factors.
        TypeError: tx is no optax transform, or train no names.

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

    instead = "train it with flax.nnx.Optimizer(adapted, tx, wrt=flax.nnx.Param)"
    modules.refuse_adapted("tx", tx, instead)
    _check_transform(tx)
    names = (train,) if isinstance(train, str) else train
    if not checks.is_listing(names) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"train must name some of {FACTORS}: got {checks.shown(train)}")
    if not names or not {*names} <= {*FACTORS}:
        raise ValueError(f"train must name some of {FACTORS}: got {train!r}")

    def chosen(params, *, kept=True):
        marks = [(name in names) == kept for name in factor_names(params)]
        return jax.tree.structure(params).unflatten(marks)

    factors_only = optax.chain(
        optax.masked(tx, chosen),
        optax.masked(optax.stateless(_zeros), functools.partial(chosen, kept=False)),
    )

    def init(params):
        check_some(jax.tree.leaves(chosen(params)))
        return factors_only.init(params)

    return optax.GradientTransformationExtraArgs(init, factors_only.update)


def _check_transform(tx: object) -> None:
    if not isinstance(tx, tuple) or not all(hasattr(tx, name) for name in ("init", "update")):
        raise TypeError(
            f"tx must be an optax transform, as optax.adam(1e-3): got {checks.shown(tx)}"
        )


def _zeros(updates: PyTree, params: PyTree) -> PyTree:
    """Return updates of zero; integers, as the codes of quantized weights, have no gradient."""

    def zero(update, param):
        dtype = param.dtype if update.dtype == jax.dtypes.float0 else update.dtype
        return jnp.zeros(update.shape, dtype)

    return jax.tree.map(zero, updates, updates if params is None else params)
