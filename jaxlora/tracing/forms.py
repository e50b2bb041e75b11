"""The forms of a product with an adapted weight, and which one is used where.

A product of N tokens with a weight of in-size d and out-size k and factors of rank r takes, in a
forward and a backward pass, beyond the product with the base:

- factored, ``x W + (x a) b``: 6·N·r·(d + k) operations, and moves 4·N·(d + k) elements (forward
  reads x, reads and writes y; backward reads x once and g twice, reads and writes dx).
- weight-side, ``x (W + a b)`` and ``g (W + a b)^T`` (RunLoRA, Cherniuk et al. 2023,
  arXiv:2312.03415): 4·N·r·(d + k) + 4·r·d·k operations, and moves 2·N·(d + k) + 4·d·k elements
  (x and g twice, for ``a`` and ``b``; the weight read and written twice, for it is not kept
  between the passes). The gradients of the factors come from x and g; the weight's is not formed.

By either count the second is cheaper where N·(d + k) > 2·d·k. It is not used where it would not
be exact: where the sum would be rounded to a dtype narrower than float32, or x has dropout. Nor is
it on a mesh of several devices, which would have to gather the weight in effect for each pass.
Without differentiation there is no backward pass to save on, and the form is factored.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxlora.tracing import axes, placement
from jaxlora.tracing.interpreter import Form, Walk
from jaxlora.tracing.lowrank import LowRank, Role
from jaxlora.weight import merge_dtype


def choose(walk: Walk, weight: LowRank, tokens: int) -> Form:
    """Return the form of the product of some tokens with a weight.

    Args:
        walk: tells the user's choice, and whether the program is to be transposed.
        weight: the weight.
        tokens: rows of the input for each entry of the weight's stack.
    """
    labels = [label for label, _ in axes.pieces(weight.dims)]
    has_dropout = weight.keys is not None and weight.origin.dropout_rate > 0
    if walk.is_linear or has_dropout or axes.REPEATED in labels:
        return "factored"
    if walk.form != "auto":
        return walk.form
    in_, out = (
        math.prod(size for label, size in axes.pieces(weight.dims) if label == role)
        for role in (Role.IN, Role.OUT)
    )
    is_exact = weight.base.dtype == merge_dtype(weight.base.dtype)
    is_known = isinstance(tokens, int)  # and not the symbol of a size that `jax.export` leaves open
    pays = is_known and tokens * (in_ + out) > 2 * in_ * out
    mesh = jax.typeof(weight.base).sharding.mesh
    is_spread = not mesh.empty and mesh.size > 1
    return "weight-side" if is_exact and pays and not is_spread else "factored"


def weight_side(
    walk: Walk,
    x: Any,
    weight: LowRank,
    bind: Callable[[Any, Any], Any],
    term: Callable[..., Any],
) -> Any:
    """Return the product of x with a weight that is made for it, in each pass anew.

    Args:
        walk: the walk.
        x: the input.
        weight: the weight.
        bind: the program's own product of an input and an array in the weight's place.
        term: ``term(walk, x, weight)``, the low-rank term of the factors alone; with
            ``moving="a"`` or ``"b"`` where that factor is a tangent.
    """

    def of(base, a, b):
        return weight.replace(base=base, a=a, b=b)

    def effective(base, a, b):
        with walk.scope(weight):
            return jax.lax.optimization_barrier(of(base, a, b).dense(merge_dtype(base.dtype)))

    def made(x, base, a, b):
        return bind(x, effective(base, a, b))

    def factored(x, base, a, b):
        return with_term(walk, bind(x, base), x, of(base, a, b), term)

    def tangent(y, primals, tangents):
        x, base, a, b = primals
        dx, dbase, da, db = tangents
        if not isinstance(dx, SymbolicZero):
            yield jax.checkpoint(made)(dx, base, a, b)
        if not isinstance(dbase, SymbolicZero):
            yield bind(x, dbase)
        with walk.scope(weight):
            if not isinstance(da, SymbolicZero):
                yield _like(term(walk, x, of(base, da, b), moving="a"), y)
            if not isinstance(db, SymbolicZero):
                yield _like(term(walk, x, of(base, a, db), moving="b"), y)

    def jvp(primals, tangents):
        y = differentiated(*primals)
        parts = list(tangent(y, primals, tangents)) or [jnp.zeros_like(y)]
        return y, sum(parts[1:], parts[0])

    differentiated = jax.custom_jvp(made)
    product = jax.custom_jvp(factored)
    for function in (differentiated, product):
        function.defjvp(jvp, symbolic_zeros=True)
    return product(x, weight.base, weight.a, weight.b)


def with_term(walk: Walk, y: Any, x: Any, weight: LowRank, term: Callable[..., Any]) -> Any:
    """Return the product with the base plus the low-rank term."""
    with walk.scope(weight):
        return y + _like(term(walk, x, weight), y)


def _like(product: Any, y: Any) -> Any:
    return placement.like(product, y).astype(y.dtype)
