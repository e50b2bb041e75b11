"""Products of two arrays by the names of their axes.

The factors of an adapter are skinny, and what their products cost is moving the activations. XLA on
CPU transposes and recomputes whole 3-D activations for the gradient of a factor; with all tokens
flattened into one axis it does not. XLA on TPU folds reshapes and layouts of activations into the
operations around them, and a flattened axis stands in the way of that: with it the scanned step of
`benchmarks/tpu.py` is 1.10 of the frozen model's at best and 1.29 of its bytes, without it 1.08 and
1.25. So the gradients of factors are flattened to matrices ``(batch, m, k) x (batch, k, n)`` on
CPU, and nothing else is that has tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jaxlora.tracing.values import placement
from jaxlora.tracing.values.tangents import moves, summed
from jaxlora.weights.adapters import merge_dtype

Name = Hashable
CHECKPOINT_NAME = "lora"


def contract(
    x: jax.Array,
    x_names: Sequence[Name],
    y: jax.Array,
    y_names: Sequence[Name],
    out_names: Sequence[Name],
    precision: lax.PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Return the sum over every name that both arrays have and the output does not.

    Args:
        x: array with one axis for each of x_names.
        x_names: names of its axes, all different.
        y: array with one axis for each of y_names.
        y_names: names of its axes, all different.
        out_names: names of the axes of the result; every name that only one array has is among
            them.
        precision: as in `jax.lax.dot_general`.
        dtype: dtype of the result and, where the platform has it, of the sum.

    Returns:
        Array with one axis for each of out_names.

    >>> import jax.numpy as jnp
    >>> x, a = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    >>> contract(x, "bti", a, "ir", "rbt").shape
    (5, 2, 3)
    """
    if placement.product_sharding([(x, x_names), (y, y_names)], out_names) is not None:
        return _contract_in_place(x, x_names, y, y_names, out_names, precision, dtype)
    sizes = dict(zip((*x_names, *y_names), (*x.shape, *y.shape), strict=True))
    batch = [n for n in x_names if n in y_names and n in out_names]
    summed = [n for n in x_names if n in y_names and n not in out_names]
    x_free = [n for n in x_names if n not in y_names]
    y_free = [n for n in y_names if n not in x_names]

    def flat(array, names, *groups):
        order = [names.index(n) for group in groups for n in group]
        shape = [math.prod(sizes[n] for n in group) for group in groups]
        return array.transpose(order).reshape(shape if batch else shape[1:])

    lead = 1 if batch else 0
    numbers = (((lead + 1,), (lead,)), ((0,), (0,)) if batch else ((), ()))
    product = lax.dot_general(
        flat(x, list(x_names), batch, x_free, summed),
        flat(y, list(y_names), batch, summed, y_free),
        numbers,
        precision=precision,
        preferred_element_type=dtype,
    )
    names = [*batch, *x_free, *y_free]
    product = product.reshape([sizes[n] for n in names])
    return jnp.transpose(product, [names.index(n) for n in out_names])


def _contract_in_place(
    x: jax.Array,
    x_names: Sequence[Name],
    y: jax.Array,
    y_names: Sequence[Name],
    out_names: Sequence[Name],
    precision: lax.PrecisionLike,
    dtype: DTypeLike | None,
) -> jax.Array:
    """Return what `contract` does, with no axes joined, as a mesh with Explicit axes needs it."""
    batch = [n for n in x_names if n in y_names and n in out_names]
    summed = [n for n in x_names if n in y_names and n not in out_names]
    names = [*batch, *(n for n in (*x_names, *y_names) if n not in (*batch, *summed))]

    def dims(group):
        return [x_names.index(n) for n in group], [y_names.index(n) for n in group]

    product = lax.dot_general(
        x,
        y,
        (dims(summed), dims(batch)),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=placement.product_sharding([(x, x_names), (y, y_names)], names),
    )
    return jnp.transpose(product, [names.index(n) for n in out_names])


@jax.custom_vjp
def send_back(y: jax.Array, h: jax.Array) -> jax.Array:
    """Identity on y whose VJP sends h itself as h's cotangent.

    With ``h = x a`` the gradient of ``a`` is then that of ``|x a|² / 2``, which is ``(x^T x) a``.
    """
    del h
    return y


send_back.defvjp(lambda y, h: (y, h), lambda h, cotangent: (cotangent, h))


@dataclasses.dataclass(frozen=True)
class How:
    """How a product with factors is computed.

    Attributes:
        precision: as in `jax.lax.dot_general`.
        dtype: dtype of the products.
        factor_dtype: what the factors are cast to.
        is_named: the rank-sized product has a name, `CHECKPOINT_NAME`, for policies of
            `jax.checkpoint`.
        is_made_again: the input is, in the backward pass, for this product alone.
        tangent: position of the factor that is a tangent, if one is.
    """

    precision: lax.PrecisionLike
    dtype: DTypeLike
    factor_dtype: DTypeLike
    is_named: bool
    is_made_again: bool
    tangent: int | None = None

    def product(
        self, position: int, x: jax.Array, factor: jax.Array, names: Sequence[Sequence[Name]]
    ) -> jax.Array:
        """Return the product of x and the factor of a position, see `_with_factor`."""
        product = _along_factor if self.tangent == position else _with_factor
        return product(x, factor, tuple(map(tuple, names)), self)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _with_factor(
    x: jax.Array, factor: jax.Array, names: tuple[tuple[Name, ...], ...], how: How
) -> jax.Array:
    """Return the product of x and a factor, in the dimensions that x has.

    Only its derivative along the factor is flattened to matrices: CPU needs that, and TPU folds a
    reshape of activations into the operations around it as long as none stands in their way.

    Args:
        x: array with one axis for each of the first names.
        factor: array with one axis for each of the second names, the rank last.
        names: of the axes of x, the factor and the product.
        how: how it is computed.
    """
    x_names, factor_names, out_names = names
    return _contract_in_place(x, x_names, factor, factor_names, out_names, how.precision, how.dtype)


def _along_factor(
    x: jax.Array, tangent: jax.Array, names: tuple[tuple[Name, ...], ...], how: How
) -> jax.Array:
    """Return the product of x and a tangent of a factor.

    What it gives back to the tangent is a product of shape (rank, in), which the CPU computes
    faster than (in, rank). Without the barrier the compiler would compute (in, rank) and transpose
    it. An x that is made again for it has one as well: XLA on TPU would fuse what makes it into the
    product, which would then read all that x is made of. With the barrier the scanned step of
    `benchmarks/tpu.py` is 1.08 of the frozen model's at best, 1.24 of its bytes and 1.02 of its
    temporaries, without it 1.08, 1.25 and 1.07. Not so where products share an x, which is mostly
    normalized, and made of no more than itself: what a slice reads and writes for each device in
    `benchmarks/tpu_mesh.py` is up to 9 % more with a barrier there.
    """
    x_names, factor_names, out_names = names
    rank_first = (factor_names[-1], *factor_names[:-1])

    def product(contracted, x, tangent):
        rows = lax.optimization_barrier(jnp.moveaxis(tangent, -1, 0))
        return contracted(x, x_names, rows, rank_first, out_names, how.precision, how.dtype)

    def in_place(x, tangent):
        x = lax.optimization_barrier(x) if how.is_made_again else x
        return product(_contract_in_place, x, tangent)

    flat = functools.partial(product, contract)
    return lax.platform_dependent(x, tangent, cpu=flat, default=in_place)


@functools.partial(_with_factor.defjvp, symbolic_zeros=True)
def _with_factor_jvp(
    names: tuple[tuple[Name, ...], ...],
    how: How,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero],
) -> tuple[jax.Array, jax.Array]:
    (x, factor), (dx, dfactor) = primals, tangents
    product = _with_factor(x, factor, names, how)
    parts = []
    if moves(dx):
        parts.append(_with_factor(dx, factor, names, how))
    if moves(dfactor):
        parts.append(_along_factor(x, dfactor, names, how))
    return product, summed(parts, product)


def scaled(factor: jax.Array, scale: float, dtype: DTypeLike) -> jax.Array:
    """Return a factor scaled as it is stored, or in float32 if that is wider, and then cast."""
    if scale == 1:
        return factor.astype(dtype)
    return (factor.astype(merge_dtype(dtype)) * scale).astype(dtype)


@functools.partial(jax.jit, static_argnames=("names", "scales", "how"))
def narrow(
    x: jax.Array,
    firsts: Sequence[jax.Array],
    *,
    names: tuple[tuple[Name, ...], ...],
    scales: tuple[float, ...],
    how: How,
) -> Sequence[jax.Array]:
    """Return the rank-sized products of x and each of some scaled factors, made as one product.

    Args:
        x: the input, which is read once.
        firsts: factors whose axes have the same names and sizes, except for the last, the rank.
        names: names of the axes of x, of each factor and of each result.
        scales: of each factor.
        how: how it is computed.
    """
    pairs = zip(firsts, scales, strict=True)
    factors = [scaled(first, scale, how.factor_dtype) for first, scale in pairs]
    whole = jnp.concatenate(factors, -1) if len(factors) > 1 else factors[0]
    h = how.product(0, x, whole, names)
    h = checkpoint_name(h, CHECKPOINT_NAME) if how.is_named else h
    return lax.split(h, [first.shape[-1] for first in firsts], names[2].index(names[1][-1]))


@functools.partial(jax.jit, static_argnames=("names", "scales", "how", "out"))
def chain(
    y: jax.Array | None,
    x: jax.Array,
    first: jax.Array | None,
    second: jax.Array,
    *,
    names: tuple[tuple[Name, ...], ...],
    scales: tuple[float, float],
    how: How,
    out: tuple[tuple[int, ...], tuple[int, ...]],
) -> jax.Array:
    """Return x times two factors; no array of the size of ``first @ second`` is made on the way.

    It is traced and differentiated once for all sites of equal shapes.

    Args:
        y: what the result is added to, or None.
        x: the input.
        first: the factor that takes x to the rank, or None where x is that product already.
        second: the other factor.
        names: names of the axes of x, of first, of the rank-sized product, of second and of the
            result.
        scales: of first and second.
        how: how it is computed.
        out: which axes of the result have names, and the sizes of all.
    """
    h = x
    if first is not None:
        (h,) = narrow(x, [first], names=names[:3], scales=scales[:1], how=how)
    factor = scaled(second, scales[1], how.factor_dtype)
    product = how.product(1, h.astype(factor.dtype), factor, names[2:])
    product = placement.repeated(product, *out)
    return product if y is None else lax.add(y, cast_like(product, y))


def cast_like(product: jax.Array, y: jax.Array) -> jax.Array:
    """Return a product in the shape and dtype of y, and where y is."""
    product = placement.like(product, y)
    return product if product.dtype == y.dtype else product.astype(y.dtype)
