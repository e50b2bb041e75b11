"""Trees with adapted weights: part them, put them together, fold the product in or out.

A tree of parameters and the same tree with `LoRAWeight` nodes in it differ only at those nodes,
so every function here is one pass over the leaves by path.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora import fingerprints, parts, paths, quantized, sharding
from jaxlora.magnitude import merged
from jaxlora.quantized import QuantizedWeight
from jaxlora.weight import Adapter, LoRAWeight, Replacement, TrainedLeaf, merge_dtype

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
    leaves, treedef = paths.flatten(params)
    nodes = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, LoRAWeight)}
    whole = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TrainedLeaf)}
    if not nodes and not whole:
        raise ValueError("params has no adapted weight: make some with jaxlora.init")
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
    leaves, treedef = paths.flatten(base)
    return treedef.unflatten((leaves | _nodes(leaves, adapters)).values())


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

    def of(leaf):
        if not paths.is_trained(leaf):
            return jax.tree.map(lambda _: False, leaf)
        return jax.tree_util.tree_map_with_path(lambda path, _: _is_factor(path), leaf)

    return jax.tree.map(of, params, is_leaf=paths.is_node)


def _is_factor(keys: Any) -> bool:
    """Tell whether the keys of a leaf of a node lead to a trainable array of it."""
    return getattr(keys[-1], "name", None) in FACTORS


def merge(
    params: Any, *, with_error: bool = False, donate: bool = False, requantize: bool = False
) -> Any:
    """Fold the product of the factors into the weights.

    ``W = round(base + scaling * a b)``, summed in float32 (float64 for a float64 base) and rounded
    once to the dtype of the base. A weight with a magnitude is scaled to it before, one that is
    quantized dequantized.

    Args:
        params: a tree with `LoRAWeight` nodes.
        with_error: also return the rounding error made.
        donate: give up each adapted weight of params as soon as it is merged, so that no more
            than one is in memory twice. Their arrays are deleted, as those that are donated to a
            function under `jax.jit`, also where an error is raised.
        requantize: quantize weights that were quantized again, as they were, but for those that
            are trained themselves; else all becomes plain.

    Returns:
        A plain tree with the structure, shapes and dtypes of the base. With ``with_error`` a
        pair of it and a dict from path to the largest absolute rounding error, a float32 scalar.

    Raises:
        ValueError: no leaf is adapted, or a merged weight is not finite. Under `jax.jit` values
            are unknown, and finiteness is not checked.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jax.tree.map(jnp.shape, jaxlora.merge(params))
    {'w': (4, 3)}
    """
    leaves, treedef = paths.flatten(params)
    if not any(map(paths.is_trained, leaves.values())):
        raise ValueError("params has no adapted weight: there is nothing to merge")
    errors = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, LoRAWeight):
            how = {"donate": donate, "requantize": requantize}
            leaves[path], errors[path] = _fold(path, leaf, 1, **how)
        elif isinstance(leaf, QuantizedWeight) and not requantize:
            leaves[path] = jax.jit(quantized.values)(leaf)
        elif isinstance(leaf, TrainedLeaf):
            leaves[path] = _finite(path, leaf.now)
    plain = treedef.unflatten(leaves.values())
    return (plain, errors) if with_error else plain


def unmerge(plain: Any, adapters: Adapters) -> Any:
    """Take the product of the factors out of merged weights again.

    Args:
        plain: a tree from `merge`.
        adapters: the factors that were merged, by path.

    Returns:
        The base, within the rounding of its dtype.

    Raises:
        ValueError: a path is not in plain or has another shape, a result is not finite, or what
            was is lost: the norm that a magnitude was divided by, a leaf that was trained whole,
            what quantizing has rounded.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> _, adapters = jaxlora.split(params)
    >>> jaxlora.unmerge(jaxlora.merge(params), adapters)["w"].shape
    (4, 3)
    """
    leaves, treedef = paths.flatten(plain)
    for path, node in _nodes(leaves, adapters).items():
        lost = "leaf" if isinstance(node, TrainedLeaf) else "magnitude"
        if isinstance(node, TrainedLeaf) or node.magnitude is not None:
            raise ValueError(f"the {lost} of {path!r} cannot be unmerged: keep the base instead")
        if isinstance(node.plain, QuantizedWeight):
            raise ValueError(f"{path!r} is quantized and cannot be unmerged: keep the base instead")
        leaves[path], _ = _fold(path, node, -1)
    return treedef.unflatten(leaves.values())


def _nodes(leaves: dict[str, Any], adapters: Adapters) -> dict[str, LoRAWeight | TrainedLeaf]:
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
    columns = adapter.roles.magnitude_shape(leaf.shape)
    if adapter.magnitude is not None and (part or tuple(adapter.magnitude.shape) != columns):
        raise ValueError(
            f"the magnitude of {path!r} must have the shape {columns} and be of the whole weight: "
            f"got {adapter.magnitude.shape}"
        )
    return part


def _fold(
    path: str, node: LoRAWeight, sign: int, *, donate: bool = False, requantize: bool = False
) -> tuple[Any, Any]:
    """Return ``base + sign * delta`` and its rounding error; raise if it is not finite."""
    plain, dtype = node.plain, node.dtype
    is_quantized = isinstance(plain, QuantizedWeight)
    if requantize and is_quantized:
        axes = (
            sharding.even_axes(plain, plain),
            (),
            dict.fromkeys(("sum", *_arrays(plain, node)), ()),
        )
        folded, error, finite = sharding.run(
            _folded_again, sign, (plain, node.over(None)), plain, axes
        )
    else:
        run = jax.jit(
            _folded,
            static_argnums=2,
            out_shardings=(sharding.of(plain), None, None),
            donate_argnums=0 if donate and not is_quantized else (),
        )
        folded, error, finite = run(plain, node.over(None), sign)
    if donate and is_quantized:  # of other shapes than the result, which cannot take their place
        jax.tree.map(lambda x: None if isinstance(x, Tracer) else x.delete(), plain)
    if not isinstance(finite["sum"], Tracer) and not finite["sum"]:
        what = "merged" if sign > 0 else "unmerged"
        found = [name for name in finite if name != "sum" and not finite[name]]
        where = f"{' and '.join(found)} hold NaN or inf" if found else f"it overflows {dtype}"
        raise ValueError(f"the {what} weight {path!r} is not finite: {where}")
    return folded, error


def _finite(path: str, value: Any) -> Any:
    """Return the value of a leaf that was trained whole, or raise if it is not finite."""
    if not isinstance(value, Tracer) and not jnp.isfinite(value).all():
        raise ValueError(f"the trained leaf {path!r} is not finite: it holds NaN or inf")
    return value


def _folded_again(plain: Any, nodes: LoRAWeight, sign: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return what `_folded` does, quantized as the base."""
    return _folded(plain, nodes, sign, round_as=lambda exact: quantized.again(exact, plain))


def _folded(
    plain: Any, nodes: LoRAWeight, sign: int, round_as: Callable[[Any], Any] | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    base = quantized.values(plain)
    node = nodes.over(base)
    exact = merged(node) if sign > 0 else base.astype(merge_dtype(node.dtype)) - node.delta()
    folded = exact.astype(node.dtype) if round_as is None else round_as(exact)
    rounded = quantized.values(folded)
    error = jnp.max(jnp.abs(exact - rounded.astype(exact.dtype)))
    arrays = {"sum": [rounded], **_arrays(base, node)}
    return folded, error, {n: _all_finite(found) for n, found in arrays.items()}


def _arrays(base: Any, node: LoRAWeight) -> dict[str, list[Any]]:
    """Return the arrays that a merged weight is computed from, by name."""
    factors = ("a", "b", "magnitude")
    found = {name: [getattr(layer, name) for layer in node.layers] for name in factors}
    return {"base": [base]} | {n: arrays for n, arrays in found.items() if arrays[0] is not None}


def _all_finite(arrays: Sequence[Any]) -> Any:
    """Tell whether all elements are finite: by the largest of each row, a loop that vectorizes."""
    rows = [jnp.max(jnp.abs(array), axis=-1, initial=0) for array in arrays]
    return jnp.all(jnp.stack([jnp.isfinite(largest).all() for largest in rows]))
