"""Fold the product of the factors into one weight.

The sum is made in float32. Of a weight of 16 bits the product and the sum are four times its bytes,
and what merging costs on a CPU is their way through memory. There such a weight, if it is whole on
one device, is folded by blocks, whose memory is used again and again.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora.types import Function, Leaf, Leaves
from jaxlora.weights import blocks, memory, placed, quantized, sharding
from jaxlora.weights.adapters import Adapter, merge_dtype
from jaxlora.weights.magnitude import merged
from jaxlora.weights.nodes import LoRAWeight
from jaxlora.weights.quantized import QuantizedWeight

Terms = tuple[Adapter, ...]
# a weight, its rounding error if that is wanted, and whether all of it is finite
Folded = tuple[Leaf, jax.Array | None, jax.Array]
_BLOCK = 2**22  # elements of a block, 16 MiB in float32
_TINY = 2**13  # elements of a block that is too small to be worth its own step


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
    base, terms = node.base, node.terms
    is_quantized = isinstance(base, QuantizedWeight)
    finite = _finite(base, terms) if donate and not is_quantized else None  # the base is lost
    if requantize and is_quantized:
        axes = (sharding.even_axes(base, base), (), ())
        folded, error, is_finite = placed.run(_folded_again, how.sign, (base, terms), base, axes)
        folded = memory.beside(base, folded)
    else:
        run = jax.jit(
            _folded_in_memory,
            static_argnums=(2, 3),
            out_shardings=(sharding.concrete(base), None, None),
            donate_argnums=0 if donate and not is_quantized else (),
        )
        folded, error, is_finite = run(
            base, terms, how, _folded_by_blocks if _is_whole_on_one_device(base) else _folded
        )
    _check_finite(path, node, how.sign, is_finite, finite)
    if donate and is_quantized:  # of other shapes than the result, which cannot take their place
        jax.tree.map(lambda x: None if isinstance(x, Tracer) else x.delete(), base)
    return folded, error


def _check_finite(
    path: str, node: LoRAWeight, sign: int, is_finite: jax.Array, finite: Leaves | None = None
) -> None:
    """Raise if a folded weight, or a part of it, is not finite, and name what it comes from."""
    if isinstance(is_finite, Tracer) or is_finite:
        return
    finite = finite or _finite(node.base, node.terms)
    what = "merged" if sign > 0 else "unmerged"
    causes = [name for name in finite if not finite[name]]
    where = f"{' and '.join(causes)} hold NaN or inf" if causes else f"it overflows {node.dtype}"
    raise ValueError(f"the {what} weight {path!r} is not finite: {where}")


def can_be_cut(node: LoRAWeight, axes: Sequence[int]) -> bool:
    """Tell whether a part of a weight, not all of it along some axes, is folded without the rest.

    It is if the base is plain and whole in the memory of one device, and no adapter has a
    magnitude, or is of other parts along these axes.
    """
    is_plain = isinstance(node.base, jax.Array) and _is_whole_on_one_device(node.base)
    is_plain &= not memory.is_on_host(node.base)
    return is_plain and all(_can_be_cut(term, axes) for term in node.terms)


def fold_part(path: str, node: LoRAWeight, starts: Sequence[int], shape: Sequence[int]) -> Leaf:
    """Return a part of what `fold` returns for a weight that can be cut.

    Args:
        path: path of the weight.
        node: the weight.
        starts: where the part begins along each axis.
        shape: its shape, a tuple.

    Raises:
        ValueError: it is not finite.
    """
    folded, _, is_finite = _folded_part(node, starts, shape)
    _check_finite(path, node, 1, is_finite)
    return folded


@functools.partial(jax.jit, static_argnums=2)
def _folded_part(node: LoRAWeight, starts: Sequence[int], shape: Sequence[int]) -> Folded:
    index = [*zip(starts, shape, strict=True)]
    part = jax.lax.dynamic_slice(node.base, starts, shape)
    return _folded(part, tuple(_cut(term, index) for term in node.terms), How(1, with_error=False))


def _is_whole_on_one_device(base: Leaf) -> bool:
    base = quantized.stand_in(base)
    if isinstance(base, Tracer):
        return False  # the compiler decides where it is
    placed = getattr(base, "sharding", None)
    return placed is None or isinstance(placed, jax.sharding.SingleDeviceSharding)


def _folded_in_memory(base: Leaf, terms: Terms, how: How, fold: Function) -> Folded:
    """Return what a function folds, in the memory that the base is in."""
    folded, error, is_finite = fold(memory.on_device(base), terms, how)
    return memory.beside(base, folded), error, is_finite


def _folded_by_blocks(base: Leaf, terms: Terms, how: How) -> Folded:
    """Return what `_folded` does, on a CPU by blocks where that pays."""
    base = quantized.values(base)
    is_narrow = base.dtype.itemsize < merge_dtype(base.dtype).itemsize
    if math.prod(base.shape) <= _BLOCK or not is_narrow:
        return _folded(base, terms, how)
    sizes = _block(base.shape)
    cut = [axis for axis, size in enumerate(sizes) if size < base.shape[axis]]
    is_tiny = math.prod(sizes) < _TINY  # a size has no divisor near to what fits
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
    return folded, None if errors is None else errors.max(), jnp.all(finite)


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
    is_finite = _is_finite(rounded)
    if round_as is not None:  # codes are finite, whatever they are for
        is_finite &= _is_finite(exact)
    return folded, error, is_finite


@jax.jit
def _finite(base: Leaf, terms: Terms) -> Leaves:
    """Return of the arrays that a merged weight is computed from, by name, which are finite."""
    trained = [term.trained() for term in terms]
    found = {n: [arrays[n] for arrays in trained if n in arrays] for n in Adapter.fields}
    found = {"base": [quantized.values(memory.on_device(base))]} | found
    return {
        name: jnp.all(jnp.stack([_is_finite(array) for array in arrays]))
        for name, arrays in found.items()
        if arrays
    }


def _is_finite(array: Leaf) -> jax.Array:
    """Tell whether all elements are finite: each times zero is zero then, and so is their sum.

    On a CPU a sum takes less than half of the time of `jnp.isfinite`, and the largest element, of
    many, passes over NaN.
    """
    return jnp.sum(array.astype(merge_dtype(array.dtype)) * 0) == 0
