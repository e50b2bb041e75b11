"""What is trained of a tree, as a tree of bools or labels."""

import jax
from jax.tree_util import KeyPath

from jaxlora.types import PyTree
from jaxlora.weights import modules, paths
from jaxlora.weights.adapters import FACTORS


def mask(params: PyTree) -> PyTree:
    """Return a tree of bools, true at what is trained.

    It selects, and does not freeze: with it alone most wrappers of optax train the wrong arrays.

    - ``optax.masked(tx, mask(params))`` passes the raw gradients of all other arrays through:
      adding them to leaves that have no adapter is gradient ascent.
    - ``optax.transforms.freeze(mask(params))`` freezes where the mask is true: the factors.

    To train the factors alone use `jaxlora.freeze` on an optimizer, or `labels` with
    ``optax.partition``.

    Args:
        params: a tree with `LoRAWeight` nodes, or adapters from `split`.

    Returns:
        The same tree with a bool for each array.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jax.tree.leaves(jaxlora.mask(params))
    [False, True, True]
    """
    instead = "filter by flax.nnx.Param, which selects the factors alone"
    modules.refuse_adapted("params", params, instead)

    def marked(leaf):
        if not paths.is_trained(leaf):
            return jax.tree.map(lambda _: False, leaf)
        return jax.tree_util.tree_map_with_path(lambda path, _: _is_factor(path), leaf)

    return jax.tree.map(marked, params, is_leaf=paths.is_node)


def labels(params: PyTree) -> PyTree:
    """Return a tree of ``"trained"`` and ``"frozen"``, for ``optax.partition``.

    Args:
        params: a tree with `LoRAWeight` nodes, or adapters from `split`.

    Returns:
        The same tree with a string for each array, ``"trained"`` where `mask` is true.

    >>> import jax, jax.numpy as jnp, jaxlora, optax
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jax.tree.leaves(jaxlora.labels(params))
    ['frozen', 'trained', 'trained']
    >>> parts = {"trained": optax.adamw(1e-3), "frozen": optax.set_to_zero()}
    >>> state = optax.partition(parts, jaxlora.labels).init(params)
    """
    return jax.tree.map(lambda is_trained: "trained" if is_trained else "frozen", mask(params))


def _is_factor(keys: KeyPath) -> bool:
    """Tell whether the keys of a leaf of a node lead to a trainable array of it."""
    return getattr(keys[-1], "name", None) in FACTORS
