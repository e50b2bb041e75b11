"""Put fresh adapters on the weights of a program."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlora.initializers import FromWeight, LoftQ, from_rounding, residual
from jaxlora.initializers.registry import NAMED
from jaxlora.messages import checks
from jaxlora.targets.config import LoRAConfig
from jaxlora.targets.selection import select, select_whole
from jaxlora.targets.sites import Site, find_sites
from jaxlora.targets.skipped import warn_of_skipped
from jaxlora.targets.stacking import with_stacks
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import blocks, memory, paths, placed, quantized, tree_checks
from jaxlora.weights.adapters import Adapter, Replacement
from jaxlora.weights.magnitude import norms
from jaxlora.weights.nodes import TrainedLeaf
from jaxlora.weights.roles import factor_axes
from jaxlora.weights.target import Target

_ORDER = "init(key, fn, params, *args, config=config)"


def init(
    key: jax.Array,
    fn: Function,
    params: PyTree,
    /,
    *args: Any,
    config: LoRAConfig,
    **kwargs: Any,
) -> PyTree:
    """Return the parameters with a fresh `LoRAWeight` at each target; the output does not change.

    ``b`` is zero and ``a`` is drawn from the key of its path, so the same key gives the same
    adapters and one more target changes no other. An initializer that starts from the weight takes
    the first product out of the base, one weight at a time; one that makes up for quantizing makes
    the codes anew, and the output is nearer to that of the weights as they were. The factors of a
    sharded weight are sharded as its axes that they carry, with equal values, and drawn where they
    live.

    Args:
        key: random key.
        fn: the function that uses the parameters, as ``model.apply``; it is traced, not run.
        params: its first argument, arrays or `jax.ShapeDtypeStruct`.
        *args: its other arguments, or their shapes.
        config: what to adapt and how.
        **kwargs: its keyword arguments, except one named ``config``.

    Warns:
        SkippedWeightWarning: the targets leave out weights of two or more axes; once, with the
            reason for each.

    Returns:
        The same tree with ``LoRAWeight(base, a, b)`` at the targets: ``a`` of shape
        ``(*stack, *in, rank)``, ``b`` of shape ``(*stack, rank, *out)``, in ``config.dtype``.

    Raises:
        ValueError: params is adapted already or empty, has two leaves of one path, or the targets
            do not fit the program (see `LoRAConfig`); the initializer starts from the weights,
            and they are shapes or not finite; magnitudes and leaves to train, of shapes.
        TypeError: key is no random key, fn no function, params no tree of arrays, or config no
            `LoRAConfig`; the initializer cannot be called as it has to be.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["up"] @ params["down"], jnp.ones((2, 4))
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> config = jaxlora.LoRAConfig(rank=2, alpha=4, targets=("up",))
    >>> jaxlora.init(jax.random.key(0), model, params, x, config=config)["up"]
    LoRAWeight(base=(4, 8), a=(4, 2), b=(2, 8), alpha=4)
    """
    checks.check_key(key, _ORDER)
    checks.check_function(fn, _ORDER)
    checks.check_config(config, LoRAConfig)
    tree_checks.check_plain(tree_checks.check_tree(params, _ORDER), "init")
    leaves, treedef = paths.flatten(params)
    sites = with_stacks(find_sites(fn, params, *args, **kwargs), config.stack)
    for target in select(config, sites):
        path = target.path
        base, term = _fresh(key, sites[path], target, paths.plain(leaves[path]), config)
        if config.magnitude:
            term = _with_magnitude(target.name, base, term)
        leaves[path] = paths.with_term(leaves[path], base, term)
    for path, rows in select_whole(config, leaves).items():
        leaf = leaves[path]
        now = quantized.values(memory.on_device(leaf))
        value = jnp.array(now)
        if rows is not None:
            value = placed.run(_rows, rows, (now,), now, (None, *range(1, now.ndim)))
        leaves[path] = TrainedLeaf(leaf, Replacement(value, tuple(leaf.shape), rows=rows))
    adapted = treedef.unflatten(leaves.values())
    warn_of_skipped(config, sites, adapted)
    return adapted


def _rows(leaf: Leaf, rows: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(leaf)[jnp.array(rows)]


def _fresh(
    key: jax.Array, site: Site, target: Target, base: Leaf, config: LoRAConfig
) -> tuple[Leaf, Adapter]:
    """Return the base and the adapter of a target, whose initializer may change the base."""
    initializer, key = config.initializer, paths.random_key(key, target.name)
    if isinstance(initializer, str):
        initializer = NAMED[initializer]
    if isinstance(initializer, FromWeight):
        return residual.take_out(key, target, base, site.roles, initializer, config.dtype)
    if isinstance(initializer, LoftQ):
        return from_rounding.start(target, base, site.roles, initializer, config.dtype)
    sizes = blocks.shape(target.block, site.shape)
    stack, in_, _ = (math.prod(group) for group in site.roles.sizes(sizes))
    shape = (in_, target.rank)
    _check_initializer(initializer, key, shape, config.dtype, site.path)
    # each is a program of its own, which serves all weights that it can
    a_axes, b_axes, _ = factor_axes(site.roles, target.block)
    a_shape, b_shape = site.roles.factor_shapes(sizes, target.rank)
    is_one = stack == 1 and not placed.may_be_sharded(base)
    first = _First(_Itself(initializer), shape, config.dtype, a_shape, is_one)
    with jax.threefry_partitionable(True):  # as all that is drawn of a key that may be sharded
        keys = jax.random.split(key, stack)
    (a,) = placed.make(_draw, first, keys, base, [a_axes])
    (b,) = placed.make(_zeros, (b_shape, config.dtype), key, base, [b_axes])
    return base, Adapter(a, b, site.roles, target.alpha, tuple(site.shape), block=target.block)


def _check_initializer(
    initializer: Function, key: jax.Array, shape: tuple[int, int], dtype: DTypeLike, path: str
) -> None:
    """Raise if an initializer does not return an array of the shape and dtype asked for."""
    try:
        made = jax.eval_shape(lambda key: initializer(key, shape, dtype), key)
    except TypeError as error:
        raise TypeError(
            f"the initializer cannot be called as initializer(key, {shape}, dtype), as "
            f"{path!r} needs: {error}"
        ) from error
    if not isinstance(made, jax.ShapeDtypeStruct):
        got = checks.shown(made)
    elif made.shape != shape or made.dtype != dtype:
        got = f"{made.dtype} of shape {made.shape}"
    else:
        return
    raise ValueError(
        f"the initializer must return {dtype} of shape {shape} for {path!r}: got {got}"
    )


def _with_magnitude(name: str, base: Leaf, term: Adapter) -> Adapter:
    """Return an adapter with the norms of its columns as they are, so that its output stays."""
    if not hasattr(quantized.stand_in(base), "__array__"):
        raise ValueError(f"a magnitude starts from values: {name!r} is {base}")
    axes = [term.axes()["magnitude"]]
    (magnitude,) = placed.run(_norms, None, (base, term), base, axes)
    return dataclasses.replace(term, magnitude=magnitude)


def _norms(base: Leaf, term: Adapter, static: None) -> list[jax.Array]:
    del static
    return [norms(base, term)]


class _Itself:
    """A function that is equal to itself alone: hashable, as what is static has to be."""

    def __init__(self, function: Function):
        self.function = function

    def __hash__(self) -> int:
        return id(self.function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.function is other.function


class _First(NamedTuple):
    """What has to be known to draw the first factor of a weight.

    Attributes:
        initializer: draws an entry of its stack.
        shape: of an entry.
        dtype: of the factor.
        whole: shape of the factor.
        is_one: whether it is one entry, which is drawn as it is: that compiles in half the time,
            but on a mesh every device would draw all of it.
    """

    initializer: _Itself
    shape: tuple[int, int]
    dtype: DTypeLike
    whole: tuple[int, ...]
    is_one: bool


def _draw(keys: jax.Array, first: _First) -> tuple[jax.Array]:
    """Return ``a``, each entry of the stack from a key of its own."""

    def of(key):
        return first.initializer.function(key, first.shape, first.dtype)

    drawn = of(keys[0]) if first.is_one else jax.vmap(of)(keys)
    return (drawn.reshape(first.whole),)


def _zeros(key: jax.Array, static: tuple[tuple[int, ...], DTypeLike]) -> tuple[jax.Array]:
    """Return ``b``."""
    del key
    return (jnp.zeros(*static),)
