"""The forms of a product with an adapted weight, and which one is used where.

A product of N tokens with a weight of in-size d and out-size k and factors of rank r takes, in a
forward and a backward pass, beyond the product with the base:

- factored, ``x W + (x a) b``: 6·N·r·(d + k) operations, and moves 4·N·(d + k) elements (forward
  reads x, reads and writes y; backward reads x once and g twice, reads and writes dx).
- weight-side, ``x (W + a b)`` and ``g (W + a b)^T`` (RunLoRA, Cherniuk et al. 2023,
  arXiv:2312.03415): 4·N·r·(d + k) + 4·r·d·k operations, and moves 2·N·(d + k) + 4·d·k elements
  (x and g twice, for ``a`` and ``b``; the weight read and written twice, for it is not kept
  between the passes). The gradients of the factors come from x and g; the weight's is not formed.

By either count the second is cheaper where N·(d + k) > 2·d·k. Where several products share x, so
that ``x a`` of all and the gradient of x through it are made at once, the weight in effect is made
for the forward pass alone: that moves 2·d·k elements in the place of 2·N·k, and is cheaper where
N > d. It is not used where it would not be exact: where the sum would be rounded to a dtype
narrower than float32, or x has dropout. Nor is it on a mesh of several devices, which would have
to gather the weight in effect for each pass. Without differentiation there is no backward pass to
save on, and the form is factored.

A third form, ``[x | x a] [W; b]``, is not here: its forward pass copies x and W, 2·N·d + 2·d·k
elements in the place of the 2·N·k that adding the term to y moves, so where weight-side is exact it
always moves more than that, and its backward pass has to be split again for W to have no gradient.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.options import Form
from jaxlora.tracing.products.term import Term
from jaxlora.tracing.types import Base
from jaxlora.tracing.values import axes, placement
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.weight import Role
from jaxlora.weights.adapters import merge_dtype


def choose(run: Evaluation, weight: LowRank, term: Term, *, is_shared: bool) -> Form:
    """Return the form of the product of an input with a weight.

    Args:
        run: tells the user's choice, and whether the program is to be transposed.
        weight: the weight.
        term: the low-rank term.
        is_shared: whether other products share that of the input and the first factor.
    """
    labels = [label for label, _ in axes.pieces(weight.dims)]
    is_deferred = isinstance(weight.base, Deferred)
    if run.options.is_linear or weight.has_dropout or is_deferred or axes.REPEATED in labels:
        return "factored"
    if run.options.form != "auto":
        return run.options.form
    in_, out = (
        math.prod(size for label, size in axes.pieces(weight.dims) if label == role)
        for role in (Role.IN, Role.OUT)
    )
    if term.order == ("b", "a"):
        in_, out = out, in_
    is_exact = weight.base.dtype == merge_dtype(weight.base.dtype)
    is_known = isinstance(term.tokens, int)  # no symbol of a size that `jax.export` leaves open
    mesh = jax.typeof(weight.base).sharding.mesh
    is_spread = not mesh.empty and mesh.size > 1
    if not is_exact or not is_known or is_spread:
        return "factored"
    is_cheaper = _moves_less(term.tokens, in_, out, is_shared=is_shared)
    return "weight-side" if is_cheaper else "factored"


def _moves_less(tokens: int, in_: int, out: int, *, is_shared: bool) -> bool:
    """Tell whether weight-side moves less than factored, by the counts at the top."""
    if is_shared:  # the weight in effect is made for the forward pass alone
        return tokens > in_
    return tokens * (in_ + out) > 2 * in_ * out


def weight_side(
    run: Evaluation,
    x: jax.Array,
    weight: LowRank,
    h: jax.Array | None,
    bind: Callable[[jax.Array, Base], jax.Array],
    term: Term,
) -> jax.Array:
    """Return the product of x with a weight that is made for it.

    Args:
        run: the evaluation of the program.
        x: the input.
        weight: the weight.
        h: the product of x and the first factor, where other products share it; the weight is
            then made for the forward pass alone, and h tells the gradients of x and that factor.
        bind: the program's own product of an input and an array in the weight's place.
        term: the low-rank term.
    """
    is_shared = h is not None

    def with_arrays(base, a, b):
        return weight.replace(base=base, a=a, b=b)

    def made(x, base, a, b, h):
        with run.scope(weight):
            dense = with_arrays(base, a, b).dense(merge_dtype(base.dtype))
            effective = jax.lax.optimization_barrier(dense)
        return bind(x, effective)

    def factored(x, base, a, b, h):
        return with_term(run, bind(x, base), x, with_arrays(base, a, b), h, term)

    def tangent(y, primals, tangents):
        x, base, a, b, h = primals
        dx, dbase, da, db, dh = tangents
        if _moves(dx):
            yield bind(dx, base) if is_shared else jax.checkpoint(made)(dx, base, a, b, h)
        if _moves(dbase):
            yield bind(x, dbase)
        moved = {"a": (da, with_arrays(base, da, b)), "b": (db, with_arrays(base, a, db))}
        if is_shared:
            del moved[term.order[0]]
        with run.scope(weight):
            if is_shared and _moves(dh):
                yield _like(term(run, x, with_arrays(base, a, b), dh), y)
            for name, (factor, changed) in moved.items():
                if _moves(factor):
                    yield _like(term(run, x, changed, h, moving=name), y)

    def jvp(primals, tangents):
        y = differentiated(*primals)
        parts = list(tangent(y, primals, tangents)) or [jnp.zeros_like(y)]
        return y, sum(parts[1:], parts[0])

    differentiated = jax.custom_jvp(made)
    product = jax.custom_jvp(factored)
    for function in (differentiated, product):
        function.defjvp(jvp, symbolic_zeros=True)
    return product(x, weight.base, weight.a, weight.b, h)


def with_term(
    run: Evaluation, y: jax.Array, x: jax.Array, weight: LowRank, h: jax.Array | None, term: Term
) -> jax.Array:
    """Return the product with the base plus the low-rank term."""
    low = low_rank(run, y, x, weight, h, term)
    with run.scope(weight):
        return jax.lax.add(y, low)


def low_rank(
    run: Evaluation, y: jax.Array, x: jax.Array, weight: LowRank, h: jax.Array | None, term: Term
) -> jax.Array:
    """Return the low-rank term as an array like y, the product with the base."""
    with run.scope(weight):
        return _like(term(run, x, weight, h), y)


def _moves(tangent: object) -> bool:
    return not isinstance(tangent, SymbolicZero)


def _like(product: jax.Array, y: jax.Array) -> jax.Array:
    product = placement.like(product, y)
    return product if product.dtype == y.dtype else product.astype(y.dtype)
