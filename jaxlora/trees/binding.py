"""Trees with adapted weights: split them, and put them together.

A tree of parameters and the same tree with `LoRAWeight` nodes in it differ only at those nodes,
so every function here is one pass over the leaves by path.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.messages import checks
from jaxlora.weights import blocks, fingerprints, modules, paths, tree_checks
from jaxlora.weights.nodes import Adapter, Adapters, LoRAWeight, Replacement, TrainedLeaf


def split(params: Any) -> tuple[Any, Adapters]:
    """Part a tree into its frozen base and its trainable factors.

    Args:
        params: a tree with `LoRAWeight` nodes.

    Returns:
        The tree with each node's base in its place, and the factors by path. `bind` undoes it,
        but for dropout, which is chosen for each step.

    Raises:
        TypeError: params holds adapters without their base.
        ValueError: no leaf is adapted, or two leaves have the same path.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> base["w"].shape, adapters
    ((4, 3), {'w': Adapter(a=(4, 1), b=(1, 3), alpha=16)})
    """
    instead = "use adapted.adapters(), or split adapted.params()"
    leaves, treedef = tree_checks.flatten_adapted(params, instead, "they are split already")
    nodes = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRAWeight)}
    whole = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TrainedLeaf)}
    plain = {path: node.plain for path, node in nodes.items()}
    plain |= {path: leaf.base for path, leaf in whole.items()}
    adapters: Adapters = {
        blocks.name(path, node.part): node.adapter(fingerprints.take(plain[path], node.part))
        for path in nodes
        for node in nodes[path].layers
    }
    adapters |= {
        path: Replacement(leaf.value, tuple(leaf.shape), fingerprints.take(leaf.base), leaf.rows)
        for path, leaf in whole.items()
    }
    return treedef.unflatten((leaves | plain).values()), adapters


def bind(base: Any, adapters: Adapters, *, check_base: bool = True) -> Any:
    """Put a frozen base and factors together; the opposite of `split`.

    Adapters know the weights that they were made for, and are refused on others: on those that
    they were merged into already, or on a cast of them. Values are compared where they are known,
    and not under `jax.jit` or for shapes; adapters that JAX mapped together with those of other
    bases, or ran through one compiled program, are for any of these bases.

    Args:
        base: a plain tree.
        adapters: factors by path.
        check_base: False puts adapters on any floating weights of their shapes.

    Returns:
        The tree with a `LoRAWeight` at each path of adapters.

    Raises:
        TypeError: base is no tree of weights, a value of adapters no `Adapter` or `Replacement`, or
            check_base no bool.
        ValueError: a path is not in base, is adapted already, holds no floating weight, has another
            shape, dtype or other values; adapters overlap, or have an alpha that is not finite
            and positive.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jaxlora.bind(*jaxlora.split(params))
    {'w': LoRAWeight(base=(4, 3), a=(4, 1), b=(1, 3), alpha=16)}
    """
    modules.refuse_adapted("base", base, "use jaxlora.nnx.Adapted(adapted.model, adapters)")
    checks.check_flag(check_base, "check_base")
    leaves, treedef = paths.flatten(base)
    tree_checks.check_leaves(leaves, base, "bind(base, adapters)", "base")
    nodes = nodes_over(leaves, adapters, check_base=check_base)
    return treedef.unflatten((leaves | nodes).values())


def nodes_over(
    leaves: dict[str, Any], adapters: Adapters, *, check_base: bool
) -> dict[str, LoRAWeight | TrainedLeaf]:
    """Return the node of each adapter over the leaf that it is for, or raise if it is for none."""
    tree_checks.check_adapters(adapters, some=True)
    nodes: dict[str, Any] = {}
    for name, adapter in adapters.items():
        path, text = blocks.locate(name, leaves)
        if path not in leaves:
            raise ValueError(f"the base has no leaf {path!r}; {paths.nearest(path, leaves)}")
        leaf = leaves[path]
        if paths.is_trained(leaf):
            raise ValueError(f"the leaf {path!r} is adapted already: a plain tree is needed")
        if path in nodes and None in (text, getattr(nodes[path], "part", None)):
            raise ValueError(f"adapters has two for the leaf {path!r}, and one of them is for all")
        if isinstance(adapter, Replacement):
            nodes[path] = _replaced(name, text, leaf, adapter)
        else:
            nodes[path] = _adapted(path, text, nodes.get(path, leaf), adapter)
        if check_base:
            _check_base(name, leaf, adapter)
    return nodes


def _adapted(path: str, text: str | None, below: Any, adapter: Adapter) -> LoRAWeight:
    """Return the node of an adapter over a leaf or the node of another part of it."""
    part = check_fits(path, text, paths.plain(below), adapter)
    for other in below.layers if isinstance(below, LoRAWeight) else []:
        if blocks.overlap(part, other.part):
            names = f"{blocks.name(path, part)!r} and {blocks.name(path, other.part)!r}"
            raise ValueError(f"the adapters of {names} overlap: one element has one adapter")
        if other.roles != adapter.roles:
            raise ValueError(f"the adapters of parts of {path!r} differ in the roles of its axes")
    return adapter.over(below, part)


def _replaced(name: str, text: str | None, leaf: Any, replacement: Replacement) -> TrainedLeaf:
    """Return the node of a leaf that is trained whole or by rows, or raise if it does not fit."""
    if text is not None:
        raise ValueError(f"a replacement must be for a whole leaf or for rows of it: got {name!r}")
    _check_weight(name, leaf, replacement)
    rows, value, wanted = replacement.rows, replacement.value, replacement.shape
    shape = wanted if rows is None else (len(rows), *wanted[1:])
    if tuple(value.shape) != shape:
        raise ValueError(f"the value for {name!r} must have the shape {shape}: got {value.shape}")
    return TrainedLeaf(leaf, value, rows)


def check_fits(path: str, text: str | None, leaf: Any, adapter: Adapter) -> blocks.Part | None:
    """Return the part that an adapter is for, or raise if it is not for a leaf of this shape."""
    _check_weight(path, leaf, adapter)
    is_number = isinstance(adapter.alpha, float | int | np.floating)
    if not (is_number and 0 < adapter.alpha < math.inf):
        raise ValueError(f"the alpha of {path!r} must be finite and positive: got {adapter.alpha}")
    part = blocks.resolve(text, leaf.shape)
    wanted = adapter.roles.factor_shapes(blocks.shape(part, leaf.shape), adapter.rank)
    if (tuple(adapter.a.shape), tuple(adapter.b.shape)) != wanted:
        raise ValueError(
            f"the factors of {path!r} must have the shapes a={wanted[0]}, b={wanted[1]}: "
            f"got a={adapter.a.shape}, b={adapter.b.shape}"
        )
    if adapter.magnitude is None:
        return part
    columns = adapter.roles.magnitude_shape(blocks.shape(part, leaf.shape))
    fits = tuple(adapter.magnitude.shape) == columns
    if not fits or not blocks.has_entries(part, adapter.roles.stack):
        raise ValueError(
            f"the magnitude of {path!r} must have the shape {columns} and be of the whole weight "
            f"or of entries of its stack: got {adapter.magnitude.shape}"
        )
    return part


def _check_weight(path: str, leaf: Any, adapter: Adapter | Replacement) -> None:
    """Raise if a leaf is no floating weight of the shape that an adapter is for."""
    if not hasattr(leaf, "shape") or tuple(leaf.shape) != tuple(adapter.shape):
        what = "adapter of {!r} is for a weight"
        if isinstance(adapter, Replacement):
            what = "replacement of {!r} is for a leaf"
        found = getattr(leaf, "shape", type(leaf).__name__)
        raise ValueError(f"the {what.format(path)} of shape {adapter.shape}: got {found}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"the leaf {path!r} cannot be adapted: its dtype is {leaf.dtype}, not floating"
        )


def _check_base(path: str, leaf: Any, adapter: Adapter | Replacement) -> None:
    """Raise if a leaf is known to be none that an adapter was made for."""
    if (wrong := adapter.fingerprint.refusal(leaf)) is None:
        return
    raise ValueError(
        f"the adapters of {path!r} are for another base, it {wrong}{changed_hint(adapter)}: they "
        "were merged into it already, or are for other weights; check_base=False puts them on any "
        "weight of their shape"
    )


def changed_hint(adapter: Adapter | Replacement) -> str:
    """Return what is needed in the place of a wrong base, if an initializer has changed it."""
    changed = getattr(adapter, "changed", "")
    if not changed:
        return ""
    other = "" if changed == "loftq" else ", or jaxlora.to_plain"
    return f"; the base that {changed} has left is needed{other}"
