"""Fingerprints of base weights, from a sample of their elements, and checksums of factors.

Reading all of a large model to recognise it would cost more than loading it. Of each weight up
to 256 evenly spaced elements are hashed, bit for bit; another training run, another seed or a
merged adapter changes them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlora import sharding
from jaxlora.quantized import QuantizedWeight, level, stand_in
from jaxlora.weight import Fingerprint

_SAMPLES = 256


def take(leaves: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """Return the fingerprint of each array; without digest where its values are unknown.

    Args:
        leaves: arrays, quantized weights, tracers or `jax.ShapeDtypeStruct` by path.

    Returns:
        Fingerprints by path.
    """
    # of a quantized weight the codes, and the level of its scales: their last bits depend on where
    # they were made
    known = {path: stand_in(leaf) for path, leaf in leaves.items() if _has_values(stand_in(leaf))}
    with jax.ensure_compile_time_eval():  # also where a known base meets a traced factor
        samples = {
            path: jax.jit(_sample, out_shardings=sharding.replicated(leaf))(leaf)
            for path, leaf in known.items()
        }
        levels = {
            path: jax.jit(level)(weight)
            for path, weight in leaves.items()
            if path in known and isinstance(weight, QuantizedWeight)
        }
        samples, levels = jax.device_get((samples, levels))
    return {
        path: Fingerprint(
            tuple(leaf.shape),
            leaf.code.kind if isinstance(leaf, QuantizedWeight) else str(leaf.dtype),
            _digest(samples[path], levels.get(path)) if path in known else None,
        )
        for path, leaf in leaves.items()
    }


def _digest(sample: np.ndarray, level: Any) -> str:
    found = (
        sample.tobytes() if level is None else sample.tobytes() + b"%d" % round(8 * float(level))
    )
    return hashlib.sha256(found).hexdigest()[:16]


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, Tracer)


def _sample(leaf: Any) -> jax.Array:
    """Return evenly spaced elements, ``(min(size, 256),)``."""
    count = min(leaf.size, _SAMPLES)
    indices = np.linspace(0, leaf.size - 1, count).astype(np.int64)
    positions = np.unravel_index(indices, leaf.shape)
    if (typed := sharding.explicit(leaf)) is None:
        return jnp.asarray(leaf)[positions]
    return leaf.at[positions].get(out_sharding=jax.NamedSharding(typed.mesh, jax.P()))


def checksums(factors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return a checksum over every bit of each factor, in the same structure."""
    return jax.tree.map(int, jax.device_get(jax.tree.map(_checksum, dict(factors))))


@jax.jit
def _checksum(array: Any) -> jax.Array:
    """Return the sum of the bits of each element times an odd number of its own, mod 2**32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros_like(bits)  # of each element in row-major order, also where it is sharded
    for d, size in enumerate(bits.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
