"""What the inputs of weights and their gradients are like, from one pass over data."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.linalg import matrices
from jaxlora.messages import checks
from jaxlora.targets.config import LoRAConfig
from jaxlora.targets.selection import select
from jaxlora.targets.sites import Site, find_sites
from jaxlora.targets.stacking import with_stacks
from jaxlora.tracing.transform import lora, observe
from jaxlora.trees import parting
from jaxlora.trees.binding import bind, split
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import blocks, memory, paths, tree_checks
from jaxlora.weights.adapters import Adapter
from jaxlora.weights.quantized import QuantizedWeight

__all__ = ["gradients", "moments"]

Args = tuple[Any, ...]  # the arguments of a call behind the parameters


def moments(
    fn: Function, params: PyTree, batches: Iterable[Args], *, config: LoRAConfig
) -> dict[str, jax.Array]:
    """Return the second moments of the inputs of each target, for a start from data.

    They are ``sum x^T x`` over all rows that a weight is multiplied with, in float32, computed by
    one gradient of the program for each batch. What is kept is of their size, and no inputs.

    Args:
        fn: the function that uses the parameters, as ``model.apply``.
        params: its first argument, arrays.
        batches: the other arguments of each call, all of one shape; a progress bar around them, as
            ``tqdm(batches)``, shows how far it is.
        config: what to adapt.

    Returns:
        Array ``(stack, in, in)`` by target.

    Raises:
        ValueError: there is no batch, the targets do not fit the program, or a target has no
            inputs that are told: it is looked up in, convolved with, or multiplied in ragged
            groups.

    >>> import jax.numpy as jnp, jaxlora
    >>> model, params = lambda params, x: x @ params["w"], {"w": jnp.ones((4, 3))}
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> found = jaxlora.calibration.moments(model, params, [(jnp.ones((2, 4)),)] * 3, config=config)
    >>> found["w"].shape, float(found["w"].max())
    ((1, 4, 4), 6.0)
    """
    _check("moments(fn, params, batches, config=config)", fn, params, config)
    first, batches = _peeked(batches)
    base, adapters = split(_observed(fn, params, first, config))
    run = observe(fn)

    @parting.jitted
    def of_batch(given):
        adapters, base, args = given

        def summed_outputs(adapters):
            outs = jax.tree.leaves(run(bind(base, adapters), *args))
            floating = [x for x in outs if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(jnp.sum(x.astype(jnp.float32)) for x in floating)

        found = jax.grad(summed_outputs)(adapters)
        return {name: found[name].a for name in found}

    total, _ = _summed(lambda args: of_batch((adapters, base, args)), batches)
    for name, found in total.items():
        if not found.any():
            raise ValueError(f"the target {name!r} has no inputs: it is not multiplied with any")
    return {name: found.reshape(-1, *[found.shape[-1]] * 2) for name, found in total.items()}


def gradients(
    loss: Function, params: PyTree, batches: Iterable[Args], *, config: LoRAConfig
) -> dict[str, jax.Array]:
    """Return the gradient of each target, the mean over batches, for a start from data.

    Args:
        loss: a scalar function of the parameters.
        params: its first argument, arrays.
        batches: the other arguments of each call, as for `moments`.
        config: what to adapt.

    Returns:
        Array ``(stack, in, out)`` in float32 by target.

    Raises:
        ValueError: there is no batch, the targets do not fit the program, or one is quantized.
    """
    _check("gradients(loss, params, batches, config=config)", loss, params, config, "loss")
    first, batches = _peeked(batches)
    leaves, treedef = paths.flatten(params)
    sites = with_stacks(find_sites(loss, params, *first), config.stack)
    targets = select(config, sites)
    if held := [path for path, *_ in targets if isinstance(leaves[path], QuantizedWeight)]:
        raise ValueError(f"{held[0]!r} is quantized and has no gradient: dequantize it before")
    run = lora(loss)  # others may be quantized
    arrays, rebuild = parting.parted((params, *first))
    _check_scalar(jax.eval_shape(lambda arrays: run(*rebuild(arrays)), arrays))

    @parting.jitted
    def of_batch(given):
        weights, leaves, args = given

        def lost(weights):
            return run(treedef.unflatten((leaves | weights).values()), *args)

        found = memory.on_device(jax.grad(lost)(weights))
        return {
            target.name: matrices.of_weight(
                found[target.path][blocks.slices(target.block)], sites[target.path].roles
            )
            for target in targets
        }

    weights = {target.path: leaves[target.path] for target in targets}
    total, count = _summed(lambda args: of_batch((weights, leaves, args)), batches)
    return jax.tree.map(lambda x: x / count, total)


def _check(order: str, fn: object, params: PyTree, config: object, name: str = "fn") -> None:
    checks.check_function(fn, order, name)
    tree_checks.check_plain(
        tree_checks.check_tree(params, order), order.partition("(")[0], with_values=True
    )
    checks.check_config(config, LoRAConfig)


def _check_scalar(value: Leaf) -> None:
    """Raise if the value of a loss is not one floating number."""
    is_array = hasattr(value, "shape")
    if not is_array or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        got = f"{value.dtype} of shape {value.shape}" if is_array else checks.shown(value)
        raise ValueError(f"loss must return one floating number: got {got}")


def _peeked(batches: Iterable[Args]) -> tuple[Args, Iterator[Args]]:
    """Return the first batch, and all."""
    batches = checks.each_batch(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there is no batch: at least one is needed")
    return first, itertools.chain([first], batches)


def _summed(of_batch: Callable[[Args], PyTree], batches: Iterable[Args]) -> tuple[PyTree, int]:
    """Return the sum over batches of a tree of arrays, and their number."""
    batches = iter(batches)
    total, count = of_batch(next(batches)), 1
    for args in batches:
        total, count = jax.tree.map(jnp.add, total, of_batch(args)), count + 1
    return total, count


def _check_observed(site: Site) -> None:
    """Raise if a target is multiplied by an operation that does not tell of its inputs."""
    for use in site.uses:
        if use.operation.startswith("ragged_dot"):
            raise ValueError(
                f"the inputs of {site.path!r} cannot be told: it is multiplied by {use.operation}, "
                f"at {use.source}; leave it out of the targets"
            )


def _observed(fn: Function, params: PyTree, args: Args, config: LoRAConfig) -> PyTree:
    """Return the parameters with the identity as ``a``, and no product, at each target."""
    leaves, treedef = paths.flatten(params)
    sites = with_stacks(find_sites(fn, params, *args), config.stack)
    for path, block, _, _ in select(config, sites):
        _check_observed(sites[path])
        leaf, roles = leaves[path], sites[path].roles
        shape = blocks.shape(block, leaf.shape)
        size = math.prod(roles.sizes(shape)[1])
        a_shape, b_shape = roles.factor_shapes(shape, size)
        stack = a_shape[: len(roles.stack)]
        a = jnp.broadcast_to(jnp.eye(size), (*stack, size, size)).reshape(a_shape)
        b = jnp.zeros(b_shape)
        term = Adapter(a, b, roles, float(size), tuple(leaf.shape), block=block)
        leaves[path] = paths.with_term(leaf, paths.plain(leaf), term)
    return treedef.unflatten(leaves.values())
