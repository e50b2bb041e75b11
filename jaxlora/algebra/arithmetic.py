"""What becomes of one set of adapters: scaled, dense, of a larger or a smaller rank."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlora.linalg import matrices, svd
from jaxlora.messages import checks
from jaxlora.types import PyTree
from jaxlora.weights import memory, modules, paths, quantized, tree_checks
from jaxlora.weights.adapters import Adapter, Adapters, merge_dtype
from jaxlora.weights.magnitude import merged
from jaxlora.weights.nodes import LoRAWeight


def scale(adapters: Adapters, factor: ArrayLike) -> Adapters:
    """Return adapters with their products times a number.

    Args:
        adapters: factors by path.
        factor: the number, a scalar that may be traced; ``b`` takes it.

    Raises:
        TypeError: factor is no number, or a value of adapters no adapter.
        ValueError: factor is no scalar or not finite, or an adapter has a magnitude.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> half = jaxlora.bind(base, jaxlora.algebra.scale(adapters, 0.5))
    """
    checks.check_scalar(factor, "factor")
    return {
        path: dataclasses.replace(adapter, b=(adapter.b * factor).astype(adapter.b.dtype))
        for path, adapter in matrices.check_linear(adapters).items()
    }


def delta(params: PyTree, path: str) -> jax.Array:
    """Return what is added to one weight, dense.

    Args:
        params: a tree with `LoRAWeight` nodes.
        path: path of an adapted weight.

    Returns:
        ``scaling * a b``, or with a magnitude the difference that all of it makes, in the shape of
        the weight, float32 or wider.

    Raises:
        TypeError: params is no tree of weights, or path no string.
        ValueError: there is no such leaf, or it is not adapted.
    """
    modules.refuse_adapted("params", params, "use adapted.params()")
    leaves = tree_checks.check_tree(params, "delta(params, path)")
    if not isinstance(path, str):
        raise TypeError(f"path must be the path of an adapted weight: got {checks.shown(path)}")
    adapted = {name for name, leaf in leaves.items() if isinstance(leaf, LoRAWeight)}
    if path not in adapted:
        what = "is not adapted" if path in leaves else "is no leaf of params"
        near = paths.nearest(path, adapted)
        raise ValueError(f"{path!r} {what}: the path of an adapted weight is needed; {near}")
    node = memory.on_device(leaves[path])
    return (
        node.delta()
        if not node.has_magnitude
        else merged(node) - quantized.values(node.base).astype(merge_dtype(node.dtype))
    )


def pad(adapters: Adapters, rank: int) -> Adapters:
    """Return adapters of a larger rank with the same products, their new columns and rows zero.

    Gradients of what is zero in both factors are zero too: this is for adapters of one shape,
    which share a compiled program, and not for training further. ``b`` takes the scaling, so that
    adapters of any ranks and alphas that are padded to one rank can be stacked
    (``jax.tree.map``).

    Args:
        adapters: factors by path.
        rank: rank of the result, at least 1.

    Returns:
        Factors by path, with scaling 1.

    Raises:
        TypeError: rank is no int, or a value of adapters no adapter.
        ValueError: rank is below 1, or an adapter has a larger one.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> def made(rank):
    ...     config = jaxlora.LoRAConfig(rank=rank)
    ...     params = {"w": jnp.ones((4, 3))}
    ...     params = jaxlora.init(jax.random.key(0), model, params, x, config=config)
    ...     return jaxlora.split(params)[1]
    >>> both = [jaxlora.algebra.pad(made(rank), 3) for rank in (1, 2)]
    >>> jax.tree.map(lambda *factors: jnp.stack(factors), *both)["w"].a.shape
    (2, 4, 3)
    """
    tree_checks.check_adapters(adapters)
    rank = checks.check_count(rank, "rank")

    def padded(path: str, adapter: Adapter) -> Adapter:
        if adapter.rank > rank:
            raise ValueError(
                f"rank must be at least that of every adapter: {path!r} has {adapter.rank}, "
                f"got {rank}"
            )
        more = rank - adapter.rank
        axis = len(adapter.roles.stack)
        a = jnp.pad(adapter.a, [*[(0, 0)] * (adapter.a.ndim - 1), (0, more)])
        b = (adapter.b * adapter.scaling).astype(adapter.b.dtype)
        b = jnp.pad(b, [(0, more * (i == axis)) for i in range(b.ndim)])
        return dataclasses.replace(adapter, a=a, b=b, alpha=float(rank))

    return {
        path: padded(path, adapter) if isinstance(adapter, Adapter) else adapter
        for path, adapter in adapters.items()
    }


def truncate(adapters: Adapters, rank: int) -> Adapters:
    """Return the adapters of at most this rank whose products are nearest to those given.

    They come from the singular values of each product, which is not formed; both factors take
    the square root of them. Adapters of this rank or a smaller one stay as they are.

    Args:
        adapters: factors by path.
        rank: largest rank of the result, at least 1.

    Raises:
        TypeError: rank is no int, or a value of adapters no adapter.
        ValueError: rank is below 1.
    """
    tree_checks.check_adapters(adapters)
    rank = checks.check_count(rank, "rank")
    return {
        path: _truncated(adapter, rank) if isinstance(adapter, Adapter) else adapter
        for path, adapter in adapters.items()
    }


def _truncated(adapter: Adapter, rank: int) -> Adapter:
    """Return the nearest adapter of a smaller rank, or the adapter itself."""

    def nearest(adapters):
        (whole,) = adapters
        decomposed = svd.of_product(*matrices.factors(whole), rank)
        return matrices.adapter_of_svd(whole, decomposed, whole.scaling)

    return matrices.from_adapters(nearest, [adapter]) if adapter.rank > rank else adapter
