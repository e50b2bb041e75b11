"""Fingerprints of base weights, to refuse another one later, and checksums of factors.

Adapters carry the fingerprint of the base that they were made for, `jaxlora.bind` and loading
compare it with the base at hand. What is known of a base is a sample of it, see
`jaxlora.weights.sampling`.
"""

import dataclasses
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlora.types import Leaf
from jaxlora.weights import sampling
from jaxlora.weights.blocks import Part
from jaxlora.weights.quantized import QuantizedWeight, stand_in
from jaxlora.weights.sampling import Sample

_MOST = 32  # bases that one fingerprint knows: those of more are unknown
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
    """What is known of one base weight.

    Attributes:
        dtype: name of its dtype, or the kind of the codes of a quantized weight.
        whole: sample of all of it, or None where its values are unknown.
        part: the block of it that the adapter is for, None for all of it.
        block: sample of that block, or None.
        arrays: weak references to arrays that are known to be it.
    """

    dtype: str
    whole: Sample | None = None
    part: Part | None = None
    block: Sample | None = None
    arrays: list[weakref.ref[jax.Array]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def sample(self) -> Sample | None:
        """The sample of what the adapter is for, as far as there is one."""
        return self.block or self.whole

    @property
    def sampled(self) -> Part | None:
        """The part that `sample` is of, None for all of it."""
        return None if self.block is None else self.part

    def is_array(self, array: Leaf) -> bool:
        """Tell whether this very array is known to be the base."""
        return any(known() is array for known in self.arrays)

    def remember(self, array: Leaf) -> None:
        """Know an array to be the base from now on; one of NumPy may change, and is not known."""
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            self.arrays[:] = [known for known in self.arrays if known() is not None]
            self.arrays.append(weakref.ref(array))

    def __reduce__(self) -> tuple[object, ...]:
        return Base, (self.dtype, self.whole, self.part, self.block)


class Fingerprint:
    """What is known of the base that adapters are for, as static metadata that JAX finds equal.

    Before JAX runs one compiled program for two trees, or maps over both, it compares their static
    metadata; what it returns then has that of one of the two. Adapters of two bases must not
    stop it, so all fingerprints are equal and have one hash. But adapters may so come back with
    the fingerprint of the other base. Therefore two fingerprints that were compared are one from
    then on: the base is any that either of them knows, or unknown where one of them knows none. So
    the right base is never refused, and one that is none of them still is.

    Attributes:
        bases: the bases that these adapters may be for; none where that is unknown.
    """

    __slots__ = ("_bases", "_joined")

    def __init__(self, bases: Sequence[Base] = ()):
        self._bases = tuple(bases)
        self._joined: Fingerprint | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        while (one := self._root()) is not (two := other._root()):
            before = one._bases, two._bases
            after = _united(*before)  # may wait for a device, so without the lock
            with _lock:
                if one._is_root_of(before[0]) and two._is_root_of(before[1]):
                    one._bases, two._joined = after, one
        return True

    def __hash__(self) -> int:
        return 0

    def _root(self) -> "Fingerprint":
        """Return the fingerprint that holds what is known of all that were compared with this."""
        root = self
        while root._joined is not None:
            root = root._joined
        if root is not self:
            self._joined = root
        return root

    def _is_root_of(self, bases: tuple[Base, ...]) -> bool:
        return self._joined is None and self._bases is bases

    def __reduce__(self) -> tuple[object, ...]:
        return Fingerprint, (self.bases,)

    def __deepcopy__(self, memo: object) -> "Fingerprint":
        return self

    def __repr__(self) -> str:
        return f"Fingerprint({self.dtype})"

    @property
    def bases(self) -> tuple[Base, ...]:
        """The bases that these adapters may be for; none where that is unknown."""
        return self._root()._bases

    @property
    def dtype(self) -> str | None:
        """Name of the dtype of the base or kind of its codes, None if unknown or one of two."""
        return _only({base.dtype for base in self.bases})

    @property
    def digest(self) -> str | None:
        """Hash of the sample of the whole base, None if it is unknown or one of two."""
        return _only({base.whole and base.whole.digest for base in self.bases})

    def refusal(self, weight: Leaf) -> str | None:
        """Return what is wrong with a weight as the base, None if nothing or if that is unknown.

        Args:
            weight: an array, a quantized weight, a tracer or a `jax.ShapeDtypeStruct`, of the
                shape of the base.
        """
        bases, array = self.bases, stand_in(weight)
        if not bases or any(base.is_array(array) for base in bases):
            return None
        dtype = _dtype(weight)
        alike = [base for base in bases if base.dtype == dtype]
        if not alike:
            return f"must be {_either(base.dtype for base in bases)}: got {dtype}"
        samples = {part: sampling.take(weight, part) for part in {base.sampled for base in alike}}
        others = {}
        for base in alike:
            wanted, got = base.sample, samples[base.sampled]
            if wanted is None or got is None:
                return None
            if wanted.digest == got.digest:
                base.remember(array)
                return None
            others[wanted.digest] = got.digest
        return f"holds other values (hash {_either(others.values())}, not {_either(others)})"

    def is_known(self, weight: Leaf) -> bool:
        """Tell whether a weight is known to be the base."""
        are_known = self.digest is not None and sampling.take(weight) is not None
        return are_known and self.refusal(weight) is None

    def may_equal(self, other: "Fingerprint") -> bool:
        """Tell whether two sets of adapters may be for one base, as far as it is known."""
        pairs = [(one, two) for one in self.bases for two in other.bases]
        return not pairs or any(_may_be_one(one, two) for one, two in pairs)

    def is_undone(self, weight: Leaf, merged: Leaf, noise: float) -> bool:
        """Tell whether a weight may be the base, from which another was rounded and it from that.

        Args:
            weight: the weight.
            merged: that from which it was computed, of the same dtype.
            noise: the absolute error, besides the rounding to that dtype.
        """
        return not self.bases or any(
            _is_rounded(base, weight, merged, noise) for base in self.bases
        )


def read(dtype: str | None, digest: str | None) -> Fingerprint:
    """Return the fingerprint of a base of which this was written, each None if unknown."""
    if dtype is None:
        return Fingerprint()
    if dtype == "float64":  # as NumPy has it, and JAX only if it is allowed to
        dtype = str(jax.dtypes.canonicalize_dtype(dtype))
    return Fingerprint([Base(dtype, None if digest is None else Sample(None, digest=digest))])


def take(weight: Leaf, part: Part | None = None) -> Fingerprint:
    """Return the fingerprint of a base; of its dtype alone where its values are unknown.

    Args:
        weight: an array, a quantized weight, a tracer or a `jax.ShapeDtypeStruct`.
        part: the block of it that the adapter is for, which is sampled too.
    """
    block = None if part is None else sampling.take(weight, part)
    base = Base(_dtype(weight), sampling.take(weight), part, block)
    base.remember(stand_in(weight))
    return Fingerprint([base])


def _only(values: set[str | None]) -> str | None:
    return values.pop() if len(values) == 1 else None


def _either(words: Iterable[str]) -> str:
    return " or ".join(sorted(set(words)))


def _united(one: tuple[Base, ...], two: tuple[Base, ...]) -> tuple[Base, ...]:
    """Return the bases of which adapters have one if it is in either; none if that is unknown."""
    if not one or not two or len(one) + len(two) <= _MOST:
        return (*one, *two) if one and two else ()
    distinct = {
        (base.dtype, base.part, *(s and s.digest for s in (base.whole, base.block))): base
        for base in (*one, *two)
    }
    return tuple(distinct.values()) if len(distinct) <= _MOST else ()


def _dtype(weight: Leaf) -> str:
    """Return the kind of the codes of a quantized weight, or the dtype that JAX has for another."""
    if isinstance(weight, QuantizedWeight):
        return weight.code.kind
    return str(jax.dtypes.canonicalize_dtype(weight.dtype))


def _may_be_one(one: Base, two: Base) -> bool:
    """Tell whether what is known of two bases does not differ."""
    samples = [base.sample if one.part == two.part else base.whole for base in (one, two)]
    return one.dtype == two.dtype and len({s.digest for s in samples if s}) < 2


def _is_rounded(base: Base, weight: Leaf, merged: Leaf, noise: float) -> bool:
    """Tell whether a weight may be one base, within rounding and noise."""
    if base.sample is None or base.sample.elements is None:
        return True
    samples = (base.sample, *(sampling.take(x, base.sampled) for x in (weight, merged)))
    found = [np.asarray(sample.elements) for sample in samples if sample]
    kinds = [jnp.finfo(x.dtype) for x in found if jnp.issubdtype(x.dtype, jnp.floating)]
    if len(kinds) < len(samples):  # unknown, or codes
        return True
    wanted, got, before = (x.astype(np.float64) for x in found)
    smallest = max(np.finfo(np.float32).tiny, *(float(kind.smallest_subnormal) for kind in kinds))
    half = 0.51 * max(float(kind.eps) for kind in kinds)  # of the distance to the next number
    rounding = half * (np.maximum(np.abs(wanted), np.abs(got)) + np.abs(before))
    return bool((np.abs(got - wanted) <= rounding + noise + smallest).all())


def checksums(factors: Mapping[str, Mapping[str, Leaf]]) -> dict[str, dict[str, int]]:
    """Return a checksum over every bit of each factor, in the same structure."""
    return jax.tree.map(int, jax.device_get(jax.tree.map(_checksum, dict(factors))))


@jax.jit
def _checksum(array: Leaf) -> jax.Array:
    """Return the sum of the bits of each element times an odd number of its own, mod 2**32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros_like(bits)  # of each element in row-major order, also where it is sharded
    for d, size in enumerate(bits.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
