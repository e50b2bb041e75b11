"""The node that stands for a quantized weight: few bits for each element, a scale for each block.

A block is a run of elements along one axis. With the codes ``q`` and their meaning, which is the
code itself for integers and a quantile of the normal distribution for NF4 (Dettmers et al. 2023,
arXiv:2305.14314, section 3)::

    W = scale[block] * meaning(q)

The meaning is selected bit by bit: a lookup in a table is slow on TPU. Two codes of four bits are
packed in one byte: those at one place in the two halves of a block, so that a block is unpacked
without moving elements between its rows; where a block has an odd number of elements, those of two
neighbouring blocks.

Quantized doubly, the logarithms of the scales less their mean along the axis are codes of eight
bits themselves, so that no scale, however small beside others, is off by more than a share of it.
The codes and scales are those of qwix, which is imported where they are made.
"""

import dataclasses
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxlora.types import Leaf
from jaxlora.weights import blocks, memory
from jaxlora.weights.opaque import Opaque

Kind = Literal["int8", "int4", "nf4"]
_meta = MappingProxyType({"static": True})
_SCALES_PER_BLOCK = 256

# Quantiles of the normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Code(NamedTuple):
    """How a weight is quantized.

    Attributes:
        kind: what the codes are.
        block_size: the most elements that share a scale.
        double: quantize the scales too.
    """

    kind: Kind
    block_size: int
    double: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight(Opaque):
    """A frozen weight in few bits, in the place of the leaf it was made of.

    It is a pytree node; `jaxlora.lora` makes functions accept it where they take an array, and
    makes it one where it is used. Its arrays have the axes of the weight, in full except the one
    along which its blocks lie.

    Attributes:
        codes: int8, or uint8 with two codes of four bits in each, half a block apart along the
            axis: the first in its lower bits.
        scale: of each block, float32; quantized doubly, int8 codes of ``log(scale) - offset``.
        step: the scale of those codes, or None.
        offset: the mean of those logarithms along the axis, or None.
        code: how it is quantized.
        dtype: dtype of the weight, in which it is used.
        is_packed: whether there are two codes in each.
    """

    instead = "call the function as jaxlora.lora(fn), or use jaxlora.dequantize(params)"

    codes: Leaf
    scale: Leaf
    step: Leaf
    offset: Leaf
    code: Code = dataclasses.field(metadata=_meta)
    dtype: DTypeLike = dataclasses.field(metadata=_meta)
    is_packed: bool = dataclasses.field(metadata=_meta)

    @property
    def axis(self) -> int:
        """The axis along which its blocks lie."""
        sizes = zip(self.codes.shape, self.scale.shape, strict=True)
        return next((i for i, (size, count) in enumerate(sizes) if size != count), 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        sizes = [*self.codes.shape]
        if self.is_packed:
            sizes[self.axis] *= 2
        return tuple(sizes)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.codes.shape)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the weight, and on a mesh with Explicit axes its sharding."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=_typed(self))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def __repr__(self) -> str:
        shape = self.shape if hasattr(self.codes, "shape") else self.codes
        return f"QuantizedWeight({self.code.kind}, {shape}, {self.dtype})"


def values(weight: Leaf) -> Leaf:
    """Return what a quantized weight stands for, in its dtype; anything else as it is."""
    return dequantized(weight).astype(weight.dtype) if _is_quantized(weight) else weight


def part_of(weight: Leaf, part: blocks.Part | None) -> Leaf:
    """Return a weight as it is, or a part of it on the device.

    A part of a quantized weight is one of values where it cuts the blocks.
    """
    if part is None:
        return weight
    weight = memory.on_device(weight)
    if _is_quantized(weight) and part[weight.axis] is not None:
        weight = values(weight)
    return jax.tree.map(lambda x: x[blocks.slices(part)], weight)


def stand_in(weight: Leaf) -> Leaf:
    """Return an array with the sharding of a weight, and if traced its shape, of other values."""
    if not _is_quantized(weight):
        return weight
    is_smaller = weight.is_packed and isinstance(weight.codes, Tracer)
    return jnp.concatenate([weight.codes] * 2, weight.axis) if is_smaller else weight.codes


def _is_quantized(weight: Leaf) -> bool:
    return isinstance(weight, QuantizedWeight)


def level(weight: QuantizedWeight) -> jax.Array:
    """Return the mean of the logarithms of the scales, a scalar."""
    return jnp.mean(jnp.log(weight.scale) if weight.offset is None else weight.offset)


def _typed(weight: QuantizedWeight) -> Leaf:
    """Return the sharding in the type of the codes on a mesh with Explicit axes, else None."""
    found = jax.typeof(weight.codes).sharding if isinstance(weight.codes, jax.Array) else None
    return found if found and found.mesh.explicit_axes else None


def dequantized(weight: QuantizedWeight) -> jax.Array:
    """Return what a quantized weight stands for, in float32."""
    if (typed := _typed(weight)) is None:
        return _dequantized(weight)
    automatic: Any = jax.sharding.auto_axes(_dequantized, out_sharding=typed)
    return automatic(weight)


def _dequantized(weight: QuantizedWeight) -> jax.Array:
    codes, scale, axis = weight.codes, weight.scale, weight.axis
    if weight.step is not None:
        scale = jnp.exp(_times(scale, weight.step, axis) + weight.offset)
    if weight.is_packed:
        codes = _unpacked(codes, axis, _distance(weight.shape[axis], scale.shape[axis]))
    if weight.code.kind == "nf4":
        return _times(_quantiles(codes), scale, axis)
    if weight.code.kind == "int4":
        codes = (codes ^ 8).astype(jnp.int8) - 8  # the sign is the upper of four bits
    return _times(codes, scale, axis)


def _times(meaning: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """Return the meaning of codes times the scale of their block, float32."""
    shape, blocks = meaning.shape, scale.shape[axis]
    in_blocks = meaning.reshape(*shape[:axis], blocks, shape[axis] // blocks, *shape[axis + 1 :])
    return (in_blocks.astype(scale.dtype) * jnp.expand_dims(scale, axis + 1)).reshape(shape)


def _quantiles(codes: jax.Array) -> jax.Array:
    """Return the quantiles that codes of four bits stand for, float32.

    They are selected by one bit after another. The first chooses among constants, by bits of
    theirs, so that there is no array of a constant, which a loop over layers would keep.
    """
    even, odd = np.array(_NF4, np.float32).reshape(8, 2).view(np.uint32).T
    if_set = -(codes & 1).astype(jnp.uint32)
    left = [if_set & (a ^ b) ^ a for a, b in zip(even, odd, strict=True)]
    for bit in (1, 2, 3):
        is_set = (codes >> bit & 1).astype(bool)
        pairs = zip(left[::2], left[1::2], strict=True)
        left = [lax.select(is_set, odd, even) for even, odd in pairs]
    return lax.bitcast_convert_type(left[0], jnp.float32)


def _distance(size: int, blocks: int) -> int:
    """Return how far apart the two codes of a byte are."""
    block = size // blocks
    return block if block % 2 else block // 2


def _packed(codes: jax.Array, axis: int, distance: int) -> jax.Array:
    """Return bytes of two codes each, along an axis with an even number of them."""
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    pairs = codes.reshape(*before, -1, 2, distance, *after)
    first, second = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return (first | second << 4).reshape(*before, -1, *after)


def _unpacked(codes: jax.Array, axis: int, distance: int) -> jax.Array:
    """Return the opposite of `_packed`."""
    before, size, after = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
    pairs = codes.reshape(*before, size // distance, 1, distance, *after)
    each = [2 if i == axis + 1 else 1 for i in range(pairs.ndim)]
    shift = 4 * lax.broadcasted_iota(codes.dtype, each, axis + 1)
    return (pairs >> shift & 15).reshape(*before, 2 * size, *after)


def quantized(weight: jax.Array, code: Code, axis: int) -> QuantizedWeight:
    """Return a weight quantized in blocks along an axis.

    Args:
        weight: a floating array, finite.
        code: how.
        axis: the axis; a block is the largest part of it that divides it evenly, up to
            ``code.block_size``, or all of it where none of a quarter of that does.
    """
    exact, block = weight.astype(jnp.float32), _block(weight.shape[axis], code.block_size)
    kind = code.kind if code.kind == "nf4" else jnp.dtype(code.kind)
    array = _in_blocks(exact, kind, axis, block)
    codes = array.qvalue if code.kind == "int8" else array.qvalue.astype(jnp.uint8) & 15
    is_packed = code.kind != "int8" and block > 2 and codes.shape[axis] % 2 == 0
    if is_packed:
        codes = _packed(codes, axis, _distance(codes.shape[axis], array.scale.shape[axis]))
    scale, step, offset, count = array.scale, None, None, array.scale.shape[axis]
    if code.double and 4 * count > count + 8:  # bytes of scales, and of codes for them
        shape = [*weight.shape[:axis], count, block, *weight.shape[axis + 1 :]]
        is_zero = jnp.max(jnp.abs(exact.reshape(shape)), axis + 1) == 0  # any scale will do there
        logs = jnp.log(scale)
        offset = jnp.mean(logs, axis, keepdims=True, where=~is_zero)
        offset = jnp.where(is_zero.all(axis, keepdims=True), 0, offset)
        centered = jnp.where(is_zero, 0, logs - offset)
        scales = _in_blocks(centered, jnp.int8, axis, _block(count, _SCALES_PER_BLOCK))
        scale, step = scales.qvalue, scales.scale
    return QuantizedWeight(codes, scale, step, offset, code, weight.dtype, is_packed)


def _in_blocks(array: jax.Array, kind: object, axis: int, block: int) -> Leaf:
    others = [i for i in range(array.ndim) if i != axis]
    return _qwix().quantize(array, kind, channelwise_axes=others, tiled_axes={axis: block})


def again(weight: jax.Array, like: QuantizedWeight) -> QuantizedWeight:
    """Return a weight quantized as another, in whose dtype it is used."""
    return dataclasses.replace(quantized(weight, like.code, like.axis), dtype=like.dtype)


def _block(size: int, most: int) -> int:
    """Return the largest divisor of a size up to a bound, or the size if that is far below."""
    divisor = blocks.largest_divisor(size, most)
    return divisor if divisor > 1 and 4 * divisor >= min(size, most) else size


def _qwix() -> Leaf:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("quantized weights need qwix: install jaxlora[quantized]") from error
    return qwix
