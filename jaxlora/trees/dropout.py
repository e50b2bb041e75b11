"""Dropout on the input of the low-rank path: keys for one step, in the nodes."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlora.messages import checks
from jaxlora.types import PyTree
from jaxlora.weights import modules, paths, placed, tree_checks
from jaxlora.weights.nodes import LoRAWeight


def dropout(params: PyTree, key: jax.Array, rate: float) -> PyTree:
    """Return the parameters with dropout on the input of every low-rank product.

    An element of the input is zero with probability ``rate``, and others are divided by
    ``1 - rate``; the base's own product is not touched. It holds for the calls made with the
    result, so use a new key for each step. Lookups have no input to drop. Each step of a scan
    draws anew, also for a weight that all steps share; a ``while_loop`` does not, and neither do
    several uses of one weight outside of a loop.

    Args:
        params: a tree with `LoRAWeight` nodes.
        key: random key of this step.
        rate: share dropped, in [0, 1).

    Returns:
        The same tree, to pass to a function from `jaxlora.lora`.

    Raises:
        ValueError: rate is not in [0, 1), or no leaf is adapted.
        TypeError: params is no tree of arrays, key no random key, or rate no number.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> params = jaxlora.dropout(params, jax.random.key(1), 0.1)
    >>> jaxlora.lora(model)(params, x).shape
    (2, 3)
    """
    order = "dropout(params, key, rate)"
    checks.check_key(key, order)
    checks.check_number(rate, "rate", "in [0, 1)")
    instead = "pass dropout_rate to jaxlora.nnx.adapt, or call this on adapted.params()"
    modules.refuse_adapted("params", params, instead)
    tree_checks.check_tree(params, order)
    leaves, treedef = paths.flatten(params)
    if not any(isinstance(leaf, LoRAWeight) for leaf in leaves.values()):
        raise ValueError(f"params has no adapted weight: {modules.advice(params)}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # a key of the old kind, uint32
        key = jax.random.wrap_key_data(key)
    for path, leaf in leaves.items():
        if isinstance(leaf, LoRAWeight):
            stack, _, _ = leaf.roles.sizes(leaf.shape)
            axes = (leaf.roles.stack,)
            (keys,) = placed.make(_keys, stack, paths.random_key(key, path), leaf.base, axes)
            leaves[path] = dataclasses.replace(leaf, dropout_keys=keys, dropout_rate=float(rate))
    return treedef.unflatten(leaves.values())


def _keys(key: jax.Array, stack: tuple[int, ...]) -> tuple[jax.Array]:
    return (jax.random.split(key, stack),)
