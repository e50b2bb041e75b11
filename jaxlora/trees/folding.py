"""Fold the product of the factors into one weight.

The sum is made in float32. Of a weight of 16 bits the product and the sum are four times its bytes,
and what merging costs on a CPU is their way through memory. There such a weight, if it is whole on
one device, is folded by blocks that stay in the cache.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora.types import Leaf, Leaves
from jaxlora.weights import blocks, placed, quantized, sharding
from jaxlora.weights.adapters import Adapter, merge_dtype
from jaxlora.weights.magnitude import merged
from jaxlora.weights.nodes import LoRAWeight
from jaxlora.weights.quantized import QuantizedWeight

Terms = tuple[Adapter, ...]
# a weight, its rounding error if that is wanted, what it is computed from and whether it is finite
Folded = tuple[Leaf, jax.Array | None, Leaves]
_BLOCK = 2**17  # elements of a block, 512 KiB in float32


class How(NamedTuple):
    """What is computed: the sign of the product, and whether its rounding error is wanted."""

    sign: int
    with_error: bool


def fold(
    path: str, node: LoRAWeight, sign: int, *, donate: bool = False, requantize: bool = False
) -> Leaf:
    """Return ``base + sign * delta``; raise if it is not finite."""
    return _fold(path, node, How(sign, with_error=False), donate, requantize)[0]


def rounding_error(path: str, node: LoRAWeight, *, requantize: bool) -> jax.Array:
    """Return the largest error that rounding makes of an element; raise if it is not finite."""
    error = _fold(path, node, How(1, with_error=True), False, requantize)[1]
    assert error is not None
    return error


def _fold(
    path: str, node: LoRAWeight, how: How, donate: bool, requantize: bool
) -> tuple[Leaf, jax.Array | None]:
    base, dtype = node.base, node.dtype
    is_quantized = isinstance(base, QuantizedWeight)
    if requantize and is_quantized:
        names = ("sum", *_arrays(base, node.terms))
        axes = (sharding.even_axes(base, base), (), dict.fromkeys(names, ()))
        folded, error, finite = placed.run(_folded_again, how.sign, (base, node.terms), base, axes)
    else:
        run = jax.jit(
            _folded_by_blocks if _is_whole_on_one_device(base) else _folded,
            static_argnums=2,
            out_shardings=(sharding.concrete(base), None, None),
            donate_argnums=0 if donate and not is_quantized else (),
        )
        folded, error, finite = run(base, node.terms, how)
    if donate and is_quantized:  # of other shapes than the result, which cannot take their place
        jax.tree.map(lambda x: None if isinstance(x, Tracer) else x.delete(), base)
    is_known = not isinstance(finite["sum"], Tracer)
    if found := [name for name in finite if is_known and not finite[name]]:
        what = "merged" if how.sign > 0 else "unmerged"
        causes = [name for name in found if name != "sum"]
        where = f"{' and '.join(causes)} hold NaN or inf" if causes else f"it overflows {dtype}"
        raise ValueError(f"the {what} weight {path!r} is not finite: {where}")
    return folded, error


def can_be_cut(node: LoRAWeight, axes: Sequence[int]) -> bool:
    """Tell whether a part of a weight, not all of it along some axes, is folded without the rest.

    It is if the base is plain and whole on one device, and no adapter has a magnitude, or is of
    other parts along these axes.
    """
    is_plain = isinstance(node.base, jax.Array) and _is_whole_on_one_device(node.base)
    return is_plain and all(_can_be_cut(term, axes) for term in node.terms)


@functools.partial(jax.jit, static_argnums=2)
def cut(node: LoRAWeight, starts: Sequence[int], shape: Sequence[int]) -> LoRAWeight:
    """Return a part of a weight that can be cut, which is folded as a weight of its own.

    Args:
        node: the weight.
        starts: where the part begins along each axis.
        shape: its shape, a tuple.
    """
    index = [*zip(starts, shape, strict=True)]
    part = jax.lax.dynamic_slice(node.base, starts, shape)
    return LoRAWeight(part, tuple(_cut(term, index) for term in node.terms))


def _is_whole_on_one_device(base: Leaf) -> bool:
    base = quantized.stand_in(base)
    if isinstance(base, Tracer):
        return False  # the compiler decides where it is
    placed = getattr(base, "sharding", None)
    return placed is None or isinstance(placed, jax.sharding.SingleDeviceSharding)


def _folded_by_blocks(base: Leaf, terms: Terms, how: How) -> Folded:
    """Return what `_folded` does, on a CPU by blocks where that pays."""
    base = quantized.values(base)
    is_narrow = base.dtype.itemsize < merge_dtype(base.dtype).itemsize
    if math.prod(base.shape) <= _BLOCK or not is_narrow:
        return _folded(base, terms, how)
    sizes = _block(base.shape)
    cut = [axis for axis, size in enumerate(sizes) if size < base.shape[axis]]
    is_tiny = math.prod(sizes) < _BLOCK // 16  # a size has no divisor near to what fits
    if is_tiny or not all(_can_be_cut(term, cut) for term in terms):
        return _folded(base, terms, how)
    by_blocks = functools.partial(_fold_blocks, how=how, sizes=sizes)
    whole = functools.partial(_folded, how=how)
    return jax.lax.platform_dependent(base, terms, cpu=by_blocks, default=whole)


def _fold_blocks(base: Leaf, terms: Terms, how: How, sizes: Sequence[int]) -> Folded:
    """Return what `_folded` does, block by block in the order in which they lie in memory."""
    counts = [whole // size for whole, size in zip(base.shape, sizes, strict=True)]
    in_blocks = base.reshape(-1, *sizes)
    # before JAX 0.12, XLA widens all of an array of bfloat16 to write a block of it
    as_integers = jax.__version_info__ < (0, 12)
    kept = jnp.dtype(f"uint{8 * base.dtype.itemsize}") if as_integers else base.dtype

    def one(i):
        block = jax.lax.dynamic_index_in_dim(in_blocks, i, 0, False)
        at = jnp.unravel_index(i, counts)
        index = [(j * size, size) for j, size in zip(at, sizes, strict=True)]
        folded, error, finite = _folded(block, tuple(_cut(term, index) for term in terms), how)
        return jax.lax.bitcast_convert_type(folded, kept), error, finite

    folded, errors, finite = jax.lax.map(one, jnp.arange(len(in_blocks)))
    folded = jax.lax.bitcast_convert_type(folded, base.dtype).reshape(base.shape)
    return folded, None if errors is None else errors.max(), jax.tree.map(jnp.all, finite)


def _block(shape: Sequence[int]) -> list[int]:
    """Return the shape of the largest blocks, all alike, of which each lies at one in memory."""
    sizes = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        most = max(1, _BLOCK // math.prod(sizes))
        sizes[axis] = blocks.largest_divisor(shape[axis], most)
        if sizes[axis] < shape[axis]:
            break
    return sizes


def _can_be_cut(term: Adapter, axes: Sequence[int]) -> bool:
    """Tell whether a block along some axes needs no more of a term than its own factors."""
    return term.magnitude is None and blocks.has_all_of(term.block, axes)


def _cut(term: Adapter, index: Sequence[tuple[Leaf, int]]) -> Adapter:
    """Return the term for a block of its weight, which begins so far along each axis."""

    def cut(array, axes):
        whole = [(0, size) for size in array.shape]
        found = [whole[d] if axis is None else index[axis] for d, axis in enumerate(axes)]
        starts, sizes = zip(*found, strict=True)
        return jax.lax.dynamic_slice(array, starts, sizes)

    axes = term.axes()
    arrays = {name: cut(array, axes[name]) for name, array in term.trained().items()}
    return dataclasses.replace(term, **arrays)


def _folded_again(base: Leaf, terms: Terms, sign: int) -> Folded:
    """Return what `_folded` does, quantized as the base."""
    return _folded(base, terms, How(sign, True), lambda exact: quantized.again(exact, base))


def _folded(
    base: Leaf, terms: Terms, how: How, round_as: Callable[[Leaf], Leaf] | None = None
) -> Folded:
    node = LoRAWeight(quantized.values(base), terms)
    exact = (
        merged(node) if how.sign > 0 else node.base.astype(merge_dtype(node.dtype)) - node.delta()
    )
    folded = exact.astype(node.dtype) if round_as is None else round_as(exact)
    rounded = quantized.values(folded)
    lost = jnp.abs(exact - rounded.astype(exact.dtype))
    error = jnp.max(lost, initial=0) if how.with_error else None
    arrays = {"sum": [rounded], **_arrays(node.base, terms)}
    return folded, error, {n: _all_finite(found) for n, found in arrays.items()}


def _arrays(base: Leaf, terms: Terms) -> dict[str, list[Leaf]]:
    """Return the arrays that a merged weight is computed from, by name."""
    trained = [term.trained() for term in terms]
    found = {n: [arrays[n] for arrays in trained if n in arrays] for n in Adapter.fields}
    return {"base": [base]} | {name: arrays for name, arrays in found.items() if arrays}


def _all_finite(arrays: Sequence[Leaf]) -> jax.Array:
    """Tell whether all elements are finite: each times zero is zero then, and so is their sum.

    On a CPU a sum takes less than half of the time of `jnp.isfinite`, and the largest element, of
    many, passes over NaN.
    """
    zeros = [jnp.sum(array.astype(merge_dtype(array.dtype)) * 0) for array in arrays]
    return jnp.all(jnp.stack([zero == 0 for zero in zeros]))
