"""Trees with adapted weights: part them and put them together.

A tree of parameters and the same tree with `LoRAWeight` nodes in it differ only at those nodes,
so every function here is one pass over the leaves by path.
"""

from typing import Any

import jax

from jaxlora import fingerprints, modules, parts, paths
from jaxlora.weight import Adapter, LoRAWeight, Replacement, TrainedLeaf

Adapters = dict[str, Any]  # an Adapter, or the Replacement of a leaf that is trained whole
FACTORS = ("a", "b", "magnitude", "value")  # what is trained of a node


def split(params: Any) -> tuple[Any, Adapters]:
    """Part a tree into its frozen base and its trainable factors.

    Args:
        params: a tree with `LoRAWeight` nodes.

    Returns:
        The tree with each node's base in its place, and the factors by path. `bind` undoes it,
        but for dropout, which is chosen for each step.

    Raises:
        ValueError: no leaf is adapted, or two leaves have the same path.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> base["w"].shape, adapters
    ((4, 3), {'w': Adapter(a=(4, 1), b=(1, 3), alpha=16)})
    """
    modules.refuse_adapted("params", params, "use adapted.adapters(), or split adapted.params()")
    leaves, treedef = paths.flatten(params)
    nodes = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRAWeight)}
    whole = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TrainedLeaf)}
    if not nodes and not whole:
        raise ValueError(f"params has no adapted weight: {modules.advice(params)}")
    plain = {path: node.plain for path, node in nodes.items()}
    plain |= {path: leaf.base for path, leaf in whole.items()}
    prints = fingerprints.take(plain)
    adapters: Adapters = {
        parts.name(path, node.part): node.adapter(prints[path])
        for path in nodes
        for node in nodes[path].layers
    }
    adapters |= {
        path: Replacement(leaf.value, prints[path], leaf.rows) for path, leaf in whole.items()
    }
    return treedef.unflatten((leaves | plain).values()), adapters


def bind(base: Any, adapters: Adapters) -> Any:
    """Put a frozen base and factors together; the opposite of `split`.

    Args:
        base: a plain tree.
        adapters: factors by path.

    Returns:
        The tree with a `LoRAWeight` at each path of adapters.

    Raises:
        ValueError: a path is not in base, is adapted already, or has another shape.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jaxlora.bind(*jaxlora.split(params))
    {'w': LoRAWeight(base=(4, 3), a=(4, 1), b=(1, 3), alpha=16)}
    """
    modules.refuse_adapted("base", base, "use jaxlora.nnx.Adapted(adapted.model, adapters)")
    leaves, treedef = paths.flatten(base)
    return treedef.unflatten((leaves | nodes_over(leaves, adapters)).values())


def mask(params: Any) -> Any:
    """Return a tree of bools, true at the factors, for `optax.masked`.

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

    def of(leaf):
        if not paths.is_trained(leaf):
            return jax.tree.map(lambda _: False, leaf)
        return jax.tree_util.tree_map_with_path(lambda path, _: _is_factor(path), leaf)

    return jax.tree.map(of, params, is_leaf=paths.is_node)


def _is_factor(keys: Any) -> bool:
    """Tell whether the keys of a leaf of a node lead to a trainable array of it."""
    return getattr(keys[-1], "name", None) in FACTORS


def nodes_over(leaves: dict[str, Any], adapters: Adapters) -> dict[str, LoRAWeight | TrainedLeaf]:
    """Return the node of each adapter over the leaf that it is for, or raise if it is for none."""
    if not adapters:
        raise ValueError("adapters is empty: it must hold the factors of at least one weight")
    nodes: dict[str, Any] = {}
    for name, adapter in adapters.items():
        path, text = parts.locate(name, leaves)
        if path not in leaves:
            raise ValueError(f"the base has no leaf {path!r}; {paths.nearest(path, leaves)}")
        leaf = leaves[path]
        if paths.is_trained(leaf):
            raise ValueError(f"the leaf {path!r} is adapted already: a plain tree is needed")
        if path in nodes and None in (text, getattr(nodes[path], "part", None)):
            raise ValueError(f"adapters has two for the leaf {path!r}, and one of them is for all")
        if isinstance(adapter, Replacement):
            nodes[path] = _replaced(path, leaf, adapter)
            continue
        part = check_fits(name, text, leaf, adapter)
        below = nodes.get(path, leaf)
        nodes[path] = adapter.over(below, part)
        if len({node.roles for node in nodes[path].layers}) > 1:
            raise ValueError(f"the adapters of parts of {path!r} differ in the roles of its axes")
    return nodes


def _replaced(path: str, leaf: Any, replacement: Replacement) -> TrainedLeaf:
    """Return the node of a leaf that is trained whole or by rows, or raise if it does not fit."""
    wanted, got = replacement.base.shape, getattr(leaf, "shape", type(leaf).__name__)
    if wanted != got:
        raise ValueError(f"the replacement of {path!r} is for a leaf of shape {wanted}: got {got}")
    rows, value = replacement.rows, replacement.value
    shape = wanted if rows is None else (len(rows), *wanted[1:])
    if tuple(value.shape) != shape:
        raise ValueError(f"the value for {path!r} must have the shape {shape}: got {value.shape}")
    return TrainedLeaf(leaf, value, rows)


def check_fits(path: str, text: str | None, leaf: Any, adapter: Adapter) -> parts.Part | None:
    """Return the part that an adapter is for, or raise if it is not for a leaf of this shape."""
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapters[{path!r}] must be an Adapter: got {type(adapter).__name__}")
    if not hasattr(leaf, "shape") or tuple(leaf.shape) != adapter.base.shape:
        found = getattr(leaf, "shape", type(leaf).__name__)
        raise ValueError(
            f"the adapter of {path!r} is for a weight of shape {adapter.base.shape}: got {found}"
        )
    part = parts.resolve(text, leaf.shape)
    wanted = adapter.roles.factor_shapes(parts.shape(part, leaf.shape), adapter.rank)
    if (tuple(adapter.a.shape), tuple(adapter.b.shape)) != wanted:
        raise ValueError(
            f"the factors of {path!r} must have the shapes a={wanted[0]}, b={wanted[1]}: "
            f"got a={adapter.a.shape}, b={adapter.b.shape}"
        )
    if adapter.magnitude is None:
        return part
    columns = adapter.roles.magnitude_shape(parts.shape(part, leaf.shape))
    fits = tuple(adapter.magnitude.shape) == columns
    if not fits or not parts.has_entries(part, adapter.roles.stack):
        raise ValueError(
            f"the magnitude of {path!r} must have the shape {columns} and be of the whole weight "
            f"or of entries of its stack: got {adapter.magnitude.shape}"
        )
    return part
