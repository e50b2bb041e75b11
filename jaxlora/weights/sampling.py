"""Samples of weights: a few elements, by which a weight is known again.

Reading all of a large model to recognize it would cost more than loading it. Of each weight, or of
a part of it, up to 256 evenly spaced elements are taken. They stay where the weight is until they
are compared, bit for bit by their hash; another training run, another seed or a merged adapter
changes them.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from jaxlora.types import Function, Leaf
from jaxlora.weights import blocks, memory, sharding
from jaxlora.weights.blocks import Part
from jaxlora.weights.quantized import QuantizedWeight, level, stand_in

_SAMPLES = 256


class Sample:
    """Some elements of a weight, or what is remembered of them.

    Attributes:
        elements: the elements, ``(min(size, 256),)``, or None where only their hash is known.
    """

    def __init__(self, elements: Leaf, level: Leaf = None, digest: str | None = None):
        self.elements = elements
        self._level = level  # of the scales of a quantized weight
        self._digest = digest

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the elements; it waits for them."""
        if self._digest is not None:
            return self._digest
        found = np.asarray(self.elements).tobytes()
        if self._level is not None:
            found += b"%d" % round(8 * float(self._level))
        return hashlib.sha256(found).hexdigest()[:16]

    def __reduce__(self) -> tuple[object, ...]:
        elements = None if self.elements is None else np.asarray(self.elements)
        return Sample, (elements, None, self.digest)


def take(weight: Leaf, part: Part | None = None) -> Sample | None:
    """Return evenly spaced elements of a weight or a part of it, None where they are unknown."""
    array = stand_in(weight)
    if isinstance(weight, np.ndarray):
        elements = weight[_positions(weight.shape, part)]
        return Sample(elements.astype(jax.dtypes.canonicalize_dtype(weight.dtype)))
    if not _has_values(array):
        return None

    def run(fn, *args):
        return _jitted(fn, tuple(range(1, len(args))), sharding.replicated(array))(*args)

    with jax.ensure_compile_time_eval():  # also where a known base meets a traced factor
        weight, array = memory.on_device((weight, array))
        if not isinstance(weight, QuantizedWeight):
            return Sample(run(_sample, weight, part))
        # the codes, and the level of the scales: their last bits depend on where they were made
        if part is None:
            return Sample(run(_sample, array, None), run(level, weight))
        return Sample(*run(_sample_quantized, weight, part))


def _has_values(array: Leaf) -> bool:
    if isinstance(array, np.ndarray):
        return True
    return isinstance(array, jax.Array) and not (isinstance(array, Tracer) or array.is_deleted())


@functools.lru_cache(maxsize=64)
def _jitted(fn: Function, static: tuple[int, ...], everywhere: NamedSharding | None) -> Function:
    return jax.jit(fn, static_argnums=static, out_shardings=everywhere)


def _sample(array: Leaf, part: Part | None = None) -> jax.Array:
    return _elements(array, _positions(array.shape, part))


def _sample_quantized(weight: QuantizedWeight, part: Part) -> tuple[jax.Array, jax.Array]:
    """Return codes of elements of a part, and the level of the scales there."""
    positions = _positions(weight.shape, part)

    def at(array):  # of fewer elements along the axis of its blocks
        sizes = zip(positions, array.shape, weight.shape, strict=True)
        return _elements(array, tuple(place * n // size for place, n, size in sizes))

    levels = jnp.log(at(weight.scale)) if weight.offset is None else at(weight.offset)
    return at(weight.codes), jnp.mean(levels)


def _elements(array: Leaf, positions: tuple[np.ndarray, ...]) -> jax.Array:
    if array.ndim == 0 or array.size == 0:
        return jnp.reshape(array, -1)
    if (typed := sharding.explicit(array)) is not None:
        return array.at[positions].get(out_sharding=jax.NamedSharding(typed.mesh, jax.P()))
    axes = tuple(range(array.ndim))
    return jax.lax.gather(  # as array[positions], whose indices would be programs of their own
        array,
        np.stack(positions, axis=-1),
        jax.lax.GatherDimensionNumbers((), collapsed_slice_dims=axes, start_index_map=axes),
        slice_sizes=(1,) * array.ndim,
        mode="promise_in_bounds",
    )


def _positions(shape: Sequence[int], part: Part | None) -> tuple[np.ndarray, ...]:
    """Return for each axis the indices of up to 256 evenly spaced elements of a part."""
    block = blocks.shape(part, shape)
    size = math.prod(block)
    indices = np.linspace(0, size - 1, min(size, _SAMPLES)).astype(np.int64)
    starts = (low for low, _ in blocks.padding(part, shape))
    found: Iterator[np.ndarray] = iter(np.unravel_index(indices, block) if block else ())
    return tuple(place + start for place, start in zip(found, starts, strict=True))
