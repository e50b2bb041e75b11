"""The node that stands for a quantized weight: few bits for each element, a scale for each block.

A block is a run of elements along one axis. With the codes ``q`` and their meaning, which is the
code itself for integers and a quantile of the normal distribution for NF4 (Dettmers et al. 2023,
arXiv:2305.14314, section 3)::

    W = scale[block] * meaning(q)

Quantized doubly, the scales less their mean along the axis are codes of eight bits themselves. The
codes and scales are those of qwix, which is imported where they are made or read.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Kind = Literal["int8", "int4", "nf4"]
_meta = {"static": True}
_SCALES_PER_BLOCK = 256


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
class QuantizedWeight:
    """A frozen weight in few bits, in the place of the leaf it was made of.

    It is a pytree node; `jaxlora.lora` makes functions accept it where they take an array, and
    makes it one where it is used.

    Attributes:
        array: a `qwix.QArray` of the codes, in the shape of the weight, and of the scales, of one
            smaller axis; quantized doubly, its scales are a `qwix.QArray` of ``scale - offset``.
        offset: the mean of the scales along that axis, or None where they are not quantized.
        code: how it is quantized.
        dtype: dtype of the weight, in which it is used.
    """

    array: Any
    offset: Any
    code: Code = dataclasses.field(metadata=_meta)
    dtype: Any = dataclasses.field(metadata=_meta)

    @property
    def codes(self) -> Any:
        """The codes, an integer array of the shape and with the sharding of the weight."""
        return self.array.qvalue

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return len(self.shape)

    @property
    def axis(self) -> int:
        """The axis along which its blocks lie."""
        sizes = zip(self.shape, self.array.scale.shape, strict=True)
        return next((i for i, (size, count) in enumerate(sizes) if size != count), 0)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the weight."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales on a device, where codes of four bits are packed."""
        bits = {"int4": 4, "uint4": 4}
        return sum(
            math.ceil(x.size * bits.get(str(x.dtype), 8 * x.dtype.itemsize) / 8)
            for x in jax.tree.leaves(self)
        )

    def __repr__(self):
        return f"QuantizedWeight({self.code.kind}, {self.shape}, {self.dtype})"


def values(weight: Any) -> Any:
    """Return what a quantized weight stands for, in its dtype; anything else as it is."""
    return dequantized(weight).astype(weight.dtype) if _is_quantized(weight) else weight


def stand_in(weight: Any) -> Any:
    """Return an array of the shape and with the sharding of a weight, whatever its values."""
    return weight.codes if _is_quantized(weight) else weight


def _is_quantized(weight: Any) -> bool:
    return isinstance(weight, QuantizedWeight)


def dequantized(weight: QuantizedWeight) -> jax.Array:
    """Return what a quantized weight stands for, in float32."""
    qwix, scale = _qwix(), weight.array.scale
    if weight.offset is not None:
        scale = qwix.dequantize(scale) + weight.offset
    return qwix.dequantize(dataclasses.replace(weight.array, scale=scale))


def quantized(weight: jax.Array, code: Code, axis: int) -> QuantizedWeight:
    """Return a weight quantized in blocks along an axis.

    Args:
        weight: a floating array, finite.
        code: how.
        axis: the axis; a block is the largest part of it that divides it evenly, up to
            ``code.block_size``, or all of it where none of a quarter of that does.
    """
    qwix, exact = _qwix(), weight.astype(jnp.float32)
    kind = code.kind if code.kind == "nf4" else jnp.dtype(code.kind)
    others = [i for i in range(weight.ndim) if i != axis]
    block = _block(weight.shape[axis], code.block_size)
    array = qwix.quantize(exact, kind, channelwise_axes=others, tiled_axes={axis: block})
    count = array.scale.shape[axis]
    if not code.double or 4 * count <= count + 8:  # bytes of scales, and of codes for them
        return QuantizedWeight(array, None, code, weight.dtype)
    shape = [*weight.shape[:axis], count, block, *weight.shape[axis + 1 :]]
    is_zero = jnp.max(jnp.abs(exact.reshape(shape)), axis + 1) == 0  # any scale will do there
    offset = jnp.mean(array.scale, axis, keepdims=True, where=~is_zero)
    offset = jnp.where(is_zero.all(axis, keepdims=True), 1, offset)
    centered = jnp.where(is_zero, 0, array.scale - offset)
    block = _block(count, _SCALES_PER_BLOCK)
    scale = qwix.quantize(centered, jnp.int8, channelwise_axes=others, tiled_axes={axis: block})
    return QuantizedWeight(dataclasses.replace(array, scale=scale), offset, code, weight.dtype)


def again(weight: jax.Array, like: QuantizedWeight) -> QuantizedWeight:
    """Return a weight quantized as another, in whose dtype it is used."""
    return dataclasses.replace(quantized(weight, like.code, like.axis), dtype=like.dtype)


def _block(size: int, most: int) -> int:
    """Return the largest divisor of a size up to a bound, or the size if that is far below."""
    divisor = next(n for n in range(min(size, most), 0, -1) if size % n == 0)
    return divisor if 4 * divisor >= min(size, most) else size


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("quantized weights need qwix: pip install jaxlora[quantized]") from error
    return qwix
