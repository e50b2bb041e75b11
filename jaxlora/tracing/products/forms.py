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
narrower than float32, or x has dropout; nor on accelerators, which round the operands of a product
of float32, to bfloat16 or TF32, unless its precision is HIGHEST. That is decided for the platform
that is compiled for. Nor is it used on a mesh of several devices, which would have to gather the
weight in effect for each pass. Without differentiation there is no backward pass to save on, and
the form is factored.

What else was tried for TPU, by its compiler's counts for v5p (4 layers of the shapes of Llama 3 8B,
scanned and rematerialized, 4,096 tokens, rank 16; estimated cycles and bytes over the frozen
model's, adapters on the gated layers alone; factored is 1.06 and 1.19):

- ``[x | x a] [W; b]``: 1.09 and 1.23. The compiler fuses the concatenation into the product, but
  not with the slice of a scanned stack, which it then copies. With a base that is stored with room
  for ``b`` it is 1.09 and 1.18: 16 more rows are one more pass of the matrix unit.
- ``[g | g b^T] [W | a]^T`` in the backward pass: 1.09 and 1.22.
- the term as rank sums of outer products in the epilogue of the product: 1.15 and 1.14.
- the sum in float32, rounded once: more of both.
- a Pallas kernel that adds ``h b`` before it writes, for a product alone between two activations
  (seconds at best and bytes): from 4096 to 14336 1.17 and 2.00, factored 1.19 and 2.16; from 4096
  to 4096 1.31 and 2.20, factored 1.23 and 1.85. What stands before and after the product is no
  longer part of it.

And with adapters on all products of the same layers (seconds at best and bytes; factored is 1.076
and 1.237):

- the input of every product behind a barrier, for the base as well: 1.10 and 1.28, though of the
  estimated cycles 1.05 in the place of 1.08.
- the term of a product of joined heads, from the heads before they are joined: the same, but more
  temporaries.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.options import Form, Options
from jaxlora.tracing.products.term import Term
from jaxlora.tracing.types import Base
from jaxlora.tracing.values import axes
from jaxlora.tracing.values.chain import cast_like
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.tangents import moves, summed
from jaxlora.tracing.values.weight import Role
from jaxlora.weights.adapters import merge_dtype


def choose(run: Evaluation, weight: LowRank, term: Term, *, is_shared: bool) -> tuple[Form, str]:
    """Return the form of the product of an input with a weight, and why it is that.

    Args:
        run: tells the user's choice, and whether the program is to be transposed.
        weight: the weight.
        term: the low-rank term.
        is_shared: whether other products share that of the input and the first factor.
    """
    labels = [label for label, _ in axes.pieces(weight.dims)]
    if weight.has_dropout:
        return "factored", "its input has dropout"
    if isinstance(weight.base, Deferred):
        return "factored", "its base is quantized"
    if run.options.is_linear or axes.REPEATED in labels:
        return "factored", "the weight is no operand that could be made"
    if run.options.form != "auto":
        return run.options.form, "it was asked for"
    in_, out = (
        math.prod(size for label, size in axes.pieces(weight.dims) if label == role)
        for role in (Role.IN, Role.OUT)
    )
    if term.order == ("b", "a"):
        in_, out = out, in_
    mesh = jax.typeof(weight.base).sharding.mesh
    if weight.base.dtype != merge_dtype(weight.base.dtype):
        return "factored", f"the sum would be rounded to {weight.base.dtype}"
    if not isinstance(term.tokens, int):  # a symbol of a size that `jax.export` leaves open
        return "factored", "the number of tokens is open"
    if not mesh.empty and mesh.size > 1:
        return "factored", "the weight is on several devices"
    if not _moves_less(term.tokens, in_, out, is_shared=is_shared):
        return "factored", f"it moves less with {term.tokens:,} tokens"
    if run.options.platform not in (None, "cpu") and not _is_exact(term):
        return "factored", f"{run.options.platform} rounds the operands of a product"
    return "weight-side", f"it moves less with {term.tokens:,} tokens"


def _is_exact(term: Term) -> bool:
    """Tell whether no platform rounds the operands of a product before it."""
    return term.precision in (lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)


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
    known = weight.replace(base=None, a=None, b=None)  # what JAX keeps must hold no tracer

    def with_arrays(base, a, b):
        return known.replace(base=base, a=a, b=b)

    def made(moving, x, base, a, b, h):
        everywhere = run.options.form == "weight-side" or _is_exact(term)
        nameless = with_arrays(base, a, b).nameless()
        with run.scope(known):
            effective = _in_effect(nameless, everywhere=everywhere)
        y = bind(x, effective)
        if everywhere:
            return y
        with run.scope(known):
            how = {"term": dataclasses.replace(term, gain=None), "options": run.options}
            return _with_term_elsewhere(y, x, nameless, h, **how, moving=moving)

    def factored(x, base, a, b, h):
        return with_term(run, bind(x, base), x, with_arrays(base, a, b), h, term)

    of_tangent = jax.checkpoint(functools.partial(made, "x"))

    def tangent(y, primals, tangents):
        x, base, a, b, h = primals
        dx, dbase, da, db, dh = tangents
        if moves(dx):
            yield bind(dx, base) if is_shared else of_tangent(dx, base, a, b, h)
        if moves(dbase):
            yield bind(x, dbase)
        moved = {"a": (da, with_arrays(base, da, b)), "b": (db, with_arrays(base, a, db))}
        if is_shared:
            del moved[term.order[0]]
        with run.scope(known):
            if is_shared and moves(dh):
                yield cast_like(term(run.options, x, with_arrays(base, a, b), dh), y)
            for name, (factor, changed) in moved.items():
                if moves(factor):
                    yield cast_like(term(run.options, x, changed, h, moving=name), y)

    def jvp(primals, tangents):
        y = differentiated(*primals)
        return y, summed([*tangent(y, primals, tangents)], y)

    differentiated = jax.custom_jvp(functools.partial(made, ""))
    product = jax.custom_jvp(factored)
    for function in (differentiated, product):
        function.defjvp(jvp, symbolic_zeros=True)
    return product(x, weight.base, weight.a, weight.b, h)


@functools.partial(jax.jit, static_argnames="everywhere")
def _in_effect(weight: LowRank, *, everywhere: bool) -> jax.Array:
    """Return the weight in effect, or on other platforms than CPU, if not everywhere, the base."""

    def dense(weight):
        return lax.optimization_barrier(weight.dense(merge_dtype(weight.base.dtype)))

    if everywhere:
        return dense(weight)
    return lax.platform_dependent(weight, cpu=dense, default=lambda weight: weight.base)


@functools.partial(jax.jit, static_argnames=("term", "options", "moving"))
def _with_term_elsewhere(
    y: jax.Array,
    x: jax.Array,
    weight: LowRank,
    h: jax.Array | None,
    *,
    term: Term,
    options: Options,
    moving: str,
) -> jax.Array:
    """Return the product with what `_in_effect` returned: with the term where that was the base."""

    def add(y, x, weight, h):
        return term(options, x, weight, h, moving, to=y)

    return lax.platform_dependent(y, x, weight, h, cpu=lambda y, *_: y, default=add)


def with_term(
    run: Evaluation, y: jax.Array, x: jax.Array, weight: LowRank, h: jax.Array | None, term: Term
) -> jax.Array:
    """Return the product with the base plus the low-rank term."""
    with run.scope(weight):
        return term(run.options, x, weight, h, to=y)
