"""Optimizers for the factors: restricted to them, and with a treatment of their own for each.

All are optax transforms and chain with any other. Those that tell the factors apart take adapters
from `jaxlora.split`, a tree with `LoRAWeight` nodes inside `freeze`, or the factors of a
`jaxlora.nnx.Adapted`.

Optax is imported where it is used, so that importing this library takes little more than JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxlora.linalg import matrices
from jaxlora.messages import checks
from jaxlora.trees.masks import mask
from jaxlora.weights import modules, paths
from jaxlora.weights.nodes import FACTORS, Adapter, LoRAWeight

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
        marks = [(name in names) == kept for name in _factor_names(params)]
        return jax.tree.structure(params).unflatten(marks)

    factors_only = optax.chain(
        optax.masked(tx, chosen),
        optax.masked(optax.stateless(_zeros), functools.partial(chosen, kept=False)),
    )

    def init(params):
        _check_some(jax.tree.leaves(chosen(params)))
        return factors_only.init(params)

    return optax.GradientTransformationExtraArgs(init, factors_only.update)


def _check_transform(tx: Any) -> None:
    if not isinstance(tx, tuple) or not all(hasattr(tx, name) for name in ("init", "update")):
        raise TypeError(
            f"tx must be an optax transform, as optax.adam(1e-3): got {checks.shown(tx)}"
        )


def _zeros(updates: Any, params: Any) -> Any:
    """Return updates of zero; integers, as the codes of quantized weights, have no gradient."""

    def zero(update, param):
        dtype = param.dtype if update.dtype == jax.dtypes.float0 else update.dtype
        return jnp.zeros(update.shape, dtype)

    return jax.tree.map(zero, updates, updates if params is None else params)


def scale_rates(
    *, a: float = 1.0, b: float = 1.0, magnitude: float = 1.0
) -> optax.GradientTransformation:
    """Multiply the updates of each factor, and so its learning rate, by a number.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives ``b`` a larger one: ``b=16`` after the
    optimizer. A weight decay before this is multiplied too, as in PEFT's parameter groups.

    Args:
        a: for the factors on the input side, finite and positive.
        b: for the factors on the output side.
        magnitude: for the magnitudes.

    Raises:
        ValueError: a number is not finite and positive; at ``init``, a tree without factors.

    >>> import jax.numpy as jnp, jaxlora, optax
    >>> tx = optax.chain(optax.sgd(0.5), jaxlora.optim.scale_rates(b=16))
    >>> factors = {"w": {"a": jnp.ones(()), "b": jnp.ones(())}}
    >>> updates, _ = tx.update(factors, tx.init(factors))
    >>> float(updates["w"]["a"]), float(updates["w"]["b"])
    (-0.5, -8.0)
    """
    import optax

    rates = _checked({"a": a, "b": b, "magnitude": magnitude}, "a rate", least=math.ulp(0.0))

    def update(updates, state, params=None):
        del params
        return _by_factor(lambda name, u: u * rates.get(name, 1), updates), state

    return optax.GradientTransformation(_init_stateless, update)


def decay_factors(
    *, a: float = 0.0, b: float = 0.0, magnitude: float = 0.0
) -> optax.GradientTransformation:
    """Add to the updates of each factor a multiple of the factor, a weight decay of its own.

    It stands where `optax.add_decayed_weights` would, before the learning rate.

    Args:
        a: for the factors on the input side, finite and not negative.
        b: for the factors on the output side.
        magnitude: for the magnitudes.

    Raises:
        ValueError: a number is not finite or negative; at ``init``, a tree without factors; at
            ``update``, no params.
    """
    import optax

    decays = _checked({"a": a, "b": b, "magnitude": magnitude}, "a decay", least=0.0)

    def update(updates, state, params=None):
        _need(params)
        return _by_factor(lambda name, u, p: u + decays.get(name, 0) * p, updates, params), state

    return optax.GradientTransformation(_init_stateless, update)


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

    _checked({"damping": damping}, "the damping", least=math.ulp(0.0))

    def init(params):
        state = _init_stateless(params)
        nodes = jax.tree.leaves(params, is_leaf=paths.is_node)
        nodes = [node for node in nodes if isinstance(node, Adapter | LoRAWeight)]
        if not nodes:
            raise TypeError("precondition needs Adapters or LoRAWeights, which tell their axes")
        if not all(hasattr(x, "shape") for node in nodes for x in (node.a, node.b)):
            raise TypeError("precondition needs both factors: one of them is not trained")
        return state

    def of(node, gradient):
        if not isinstance(node, Adapter | LoRAWeight):
            return gradient
        base = {"base": of(node.base, gradient.base)} if isinstance(node, LoRAWeight) else {}
        a, b = matrices.of(node)
        da, db = matrices.of(gradient)
        identity = damping * jnp.eye(node.rank)[None]
        da = jnp.linalg.solve(b @ b.mT + identity, da.mT).mT
        db = jnp.linalg.solve(a.mT @ a + identity, db)
        factors = {"a": da, "b": db}
        shaped = {n: x.reshape(getattr(node, n).shape) for n, x in factors.items()}
        cast = {n: x.astype(getattr(gradient, n).dtype) for n, x in shaped.items()}
        return dataclasses.replace(gradient, **base, **cast)

    def update(updates, state, params=None):
        _need(params)
        return jax.tree.map(of, params, updates, is_leaf=paths.is_node), state

    return optax.GradientTransformation(init, update)


def _checked(numbers: dict[str, float], what: str, *, least: float) -> dict[str, float]:
    for name, number in numbers.items():
        number = checks.check_number(number, name)
        if not (math.isfinite(number) and number >= least):
            needed = "positive" if least else "not negative"
            raise ValueError(f"{what} must be finite and {needed}: got {name}={number}")
    return numbers


def _need(params: Any) -> None:
    if params is None:
        raise ValueError("the factors themselves are needed: tx.update(updates, state, params)")


def _by_factor(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Return a tree with ``fn(name, leaf, *leaves)`` at each factor of it, by its name."""
    names = iter(_factor_names(tree))

    def of(leaf, *others):
        name = next(names)
        return fn(name, leaf, *others) if name else leaf

    return jax.tree.map(of, tree, *rest)


def _factor_names(tree: Any) -> list[str | None]:
    """Return for each leaf its name where it is a factor, also of a tree without our nodes."""
    found = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    marks = jax.tree.leaves(mask(tree))
    if any(marks):
        return [
            keys[-1].name if marked else None for keys, marked in zip(found, marks, strict=True)
        ]
    unboxed = [_unboxed(keys) for keys in found]  # an NNX state: its own keys tell its factors
    parents = {keys[:-1] for keys in unboxed if keys[-1:] == ("a",)}
    holders = {parent[:-1] for parent in parents if (*parent, "b") in unboxed}
    return [
        keys[-1] if keys[-1:] and keys[-1] in FACTORS and keys[:-2] in holders else None
        for keys in unboxed
    ]


def _unboxed(keys: Any) -> tuple[Any, ...]:
    """Return the names of keys, without that of a box around a factor."""
    names = tuple(getattr(key, "name", getattr(key, "key", None)) for key in keys)
    return names[:-1] if names[-1:] == ("value",) and {*names[-2:-1]} & {*FACTORS} else names


def _init_stateless(params: Any) -> Any:
    import optax

    _check_some(_factor_names(params))
    return optax.EmptyState()


def _check_some(factors: Sequence[Any]) -> None:
    if not any(factors):
        raise ValueError("the tree has no factors to train: make some with jaxlora.init")
