"""Fold the product of the factors into the weights, and take it out again."""

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora.messages import checks
from jaxlora.trees.binding import nodes_over
from jaxlora.trees.folding import fold, rounding_error
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import blocks, memory, modules, paths, placed, tree_checks
from jaxlora.weights.adapters import Adapter, Adapters, merge_dtype
from jaxlora.weights.nodes import LoRAWeight, TrainedLeaf
from jaxlora.weights.quantized import QuantizedWeight


def merge(params: PyTree, *, donate: bool = False, requantize: bool = False) -> PyTree:
    """Fold the product of the factors into the weights.

    ``W = round(base + scaling * a b)``, summed in float32 (float64 for a float64 base) and rounded
    once to the dtype of the base. A weight with a magnitude is scaled to it before, one that is
    quantized dequantized. What rounding loses is what `merge_error` returns.

    Args:
        params: a tree with `LoRAWeight` nodes.
        donate: give up each adapted weight of params as soon as it is merged, so that no more
            than one is in memory twice. Their arrays are deleted, as those that are donated to a
            function under `jax.jit`, also where an error is raised.
        requantize: quantize weights that were quantized again, as they were, except those that
            are trained themselves; else all becomes plain.

    Returns:
        A plain tree with the structure, shapes and dtypes of the base.

    Raises:
        TypeError: params is adapters alone, or a `jaxlora.nnx.Adapted`, which `jaxlora.nnx.merge`
            takes; a flag is no bool.
        ValueError: no leaf is adapted, or a merged weight is not finite. Under `jax.jit` values
            are unknown, and finiteness is not checked.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jax.tree.map(jnp.shape, jaxlora.merge(params))
    {'w': (4, 3)}
    """
    checks.check_flag(donate, "donate")
    checks.check_flag(requantize, "requantize")
    leaves, treedef = _flatten(params, "merge", "use jaxlora.nnx.merge(adapted)")
    for path, leaf in leaves.items():
        if isinstance(leaf, LoRAWeight):
            leaves[path] = fold(path, leaf, 1, donate=donate, requantize=requantize)
        elif isinstance(leaf, QuantizedWeight) and not requantize:
            leaves[path] = placed.plain(leaf)
        elif isinstance(leaf, TrainedLeaf):
            leaves[path] = memory.beside(leaf.base, _finite(path, leaf.now))
    return treedef.unflatten(leaves.values())


def merge_error(params: PyTree, *, requantize: bool = False) -> dict[str, jax.Array]:
    """Return how much `merge` loses by rounding each merged weight to the dtype of its base.

    Weights are merged one at a time, and none is kept.

    Args:
        params: a tree with `LoRAWeight` nodes.
        requantize: of weights that are quantized return what quantizing them again loses; else,
            what rounding to the dtype that they have in the program does.

    Returns:
        The largest absolute error of an element, a scalar in the dtype of the sum, by path of each
        adapted weight.

    Raises:
        TypeError: params is adapters alone, or a `jaxlora.nnx.Adapted`; requantize is no bool.
        ValueError: as for `merge`.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4), "bfloat16")
    >>> config, params = jaxlora.LoRAConfig(rank=1), {"w": jnp.ones((4, 3), "bfloat16")}
    >>> params = jaxlora.init(jax.random.key(0), model, params, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> fresh = jaxlora.merge_error(params)["w"]  # the product is zero yet
    >>> adapters = jax.tree.map(lambda x: jnp.full_like(x, 0.1), adapters)
    >>> trained = jaxlora.merge_error(jaxlora.bind(base, adapters))["w"]
    >>> print(f"{fresh:.5f} {trained:.5f}")  # 1.16 is 1.15625 in bfloat16
    0.00000 0.00375
    """
    checks.check_flag(requantize, "requantize")
    leaves, _ = _flatten(params, "merge_error", "use merge_error(adapted.params())")
    errors = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, LoRAWeight):
            errors[path] = rounding_error(path, leaf, requantize=requantize)
        elif isinstance(leaf, TrainedLeaf):
            _finite(path, leaf.now)
    return errors


def _flatten(params: PyTree, name: str, instead: str) -> tuple[Leaves, PyTree]:
    """Return the leaves and the treedef of a tree with adapted weights, or raise."""
    needed = f"{name} needs a tree with adapted weights"
    return tree_checks.flatten_adapted(
        params, instead, f"{needed}; put them together: {name}(bind(base, adapters))"
    )


def unmerge(plain: PyTree, adapters: Adapters, *, check_base: bool = True) -> PyTree:
    """Take the product of the factors out of merged weights again.

    What that leaves has to be the base that the adapters were made for: weights into which they
    were not merged, or of which they were taken out already, are refused. Values are compared
    where they are known, and not under `jax.jit`; see `jaxlora.bind`.

    Args:
        plain: a tree from `merge`.
        adapters: the factors that were merged, by path.
        check_base: False takes them out of any weights of their shapes.

    Returns:
        The base, within the rounding of its dtype.

    Raises:
        TypeError: plain is no tree of weights, a value of adapters no `Adapter`, or check_base no
            bool.
        ValueError: a path is not in plain or has another shape, a result is not finite or not the
            base, or what was is lost: the norm that a magnitude was divided by, a leaf that was
            trained whole, what quantizing has rounded.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> _, adapters = jaxlora.split(params)
    >>> jaxlora.unmerge(jaxlora.merge(params), adapters)["w"].shape
    (4, 3)
    """
    modules.refuse_adapted("plain", plain, "use what jaxlora.nnx.merge(adapted) returned")
    checks.check_flag(check_base, "check_base")
    leaves, treedef = paths.flatten(plain)
    tree_checks.check_leaves(leaves, plain, "unmerge(plain, adapters)", "plain")
    before = dict(leaves)
    for path, node in nodes_over(leaves, adapters, check_base=False).items():
        lost = "leaf" if isinstance(node, TrainedLeaf) else "magnitude"
        if isinstance(node, TrainedLeaf) or node.has_magnitude:
            raise ValueError(f"the {lost} of {path!r} cannot be unmerged: keep the base instead")
        if isinstance(node.base, QuantizedWeight):
            raise ValueError(f"{path!r} is quantized and cannot be unmerged: keep the base instead")
        leaves[path] = fold(path, node, -1)
    for name, adapter in adapters.items() if check_base else ():
        path, _ = blocks.locate(name, leaves)
        if isinstance(adapter, Adapter):
            _check_undone(name, leaves[path], before[path], adapter)
    return treedef.unflatten(leaves.values())


def _check_undone(name: str, base: Leaf, merged: Leaf, adapter: Adapter) -> None:
    """Raise if what was left of a merged weight is known not to be the base of an adapter."""
    arrays = base, adapter.a, adapter.b
    if any(isinstance(x, Tracer) for x in arrays):
        return
    a, b = (float(jnp.max(jnp.abs(x), initial=0)) for x in (adapter.a, adapter.b))
    largest = adapter.rank * abs(adapter.scaling) * a * b
    noise = float(jnp.finfo(merge_dtype(base.dtype)).eps) * largest
    if not adapter.fingerprint.is_undone(base, merged, noise):
        raise ValueError(
            f"the adapters of {name!r} were not merged into this weight: what is left without them "
            "is not their base; they were taken out already, or others were merged; "
            "check_base=False takes them out of any weight of their shape"
        )


def _finite(path: str, value: Leaf) -> Leaf:
    """Return the value of a leaf that was trained whole, or raise if it is not finite."""
    if not isinstance(value, Tracer) and not jnp.isfinite(value).all():
        raise ValueError(f"the trained leaf {path!r} is not finite: it holds NaN or inf")
    return value
