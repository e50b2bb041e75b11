"""Rules for control flow: the construct is rebuilt around the same walk of its body.

A low-rank weight is a pytree, so it enters and leaves a rebuilt construct like any array. The
public functions of JAX rebuild them, so that differentiation, batching and compilation are
JAX's own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from jaxlora.tracing import compat, deferred
from jaxlora.tracing.deferred import Deferred
from jaxlora.tracing.interpreter import Walk, rule
from jaxlora.tracing.lowrank import CARRIES, LowRank, Role
from jaxlora.tracing.spmd import constrained


@rule(*compat.JIT, passes=True)
def jit(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Compile the inner program again, under its name and with its shardings."""
    params = eqn.params
    values = tuple(map(constrained, values, params["in_shardings"]))
    outs = walk.compiled(params["jaxpr"], params["name"])(*values)
    return [*map(constrained, outs, params["out_shardings"])]


@rule("closed_call", "core_call", passes=True)
def call(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Run the inner program in place."""
    return walk.run(eqn.params["call_jaxpr"], *values)


@rule(*compat.REMAT, passes=True)
def remat(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Rematerialize the walk of the inner program, with the same policy."""
    params = eqn.params

    def inner(*values):
        return walk.run(params["jaxpr"], *values)

    again = jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return again(*values)


@rule("custom_jvp_call")
def custom_jvp_call(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Keep the function's own derivative, evaluated with low-rank weights as well.

    The tangent of a low-rank weight is the sum of two, ``da b`` and ``a db``.
    """

    def dense(outs):
        return [
            walk.densify(eqn, out, "it leaves a function with its own derivative") for out in outs
        ]

    has_gain = [isinstance(value, LowRank) and value.gain is not None for value in values]
    reason = "it has a magnitude, and the function its own derivative"
    values = tuple(
        walk.densify(eqn, value, reason) if has else walk.made(eqn, value)
        for value, has in zip(values, has_gain, strict=True)
    )

    @jax.custom_jvp
    def function(values):
        return dense(walk.run(eqn.params["call_jaxpr"], *values))

    @function.defjvp
    def jvp(primals, tangents):
        (values,), (dots,) = primals, tangents
        moves = [i for i, v in enumerate(values) if jnp.issubdtype(_base(v).dtype, jnp.inexact)]

        def derivative(values, moving):
            dots = [np.zeros(value.shape, dtypes.float0) for value in values]
            for i, dot in zip(moves, moving, strict=True):
                dots[i] = dot
            return jax.jvp(lambda *v: compat.bind(eqn, v), values, dots)

        arrays = [_base(v) for v in values]
        program = jax.make_jaxpr(derivative)(arrays, [arrays[i] for i in moves])
        outs, *parts = (
            walk.derivative().run(program, *values, *moving)
            for moving in _tangents([(values[i], dots[i]) for i in moves])
        )
        outs = dense(outs)
        primal, tangent = outs[: len(outs) // 2], outs[len(outs) // 2 :]
        for part in parts:
            tangent = jax.tree.map(jnp.add, tangent, dense(part)[len(tangent) :])
        return primal, tangent

    return function(list(values))


def _base(value: Any) -> Any:
    return value.base if isinstance(value, LowRank) else jnp.asarray(value)


def _tangents(pairs: Sequence[tuple[Any, Any]]) -> list[list[Any]]:
    """Return tangents whose sum is that of the values, each linear in what moves.

    The tangent of ``a b`` is ``da b + a db``: two weights of the same rank, for a derivative that
    has to stay linear.
    """
    first = [
        dot.replace(b=value.b, keys=None) if isinstance(value, LowRank) else dot
        for value, dot in pairs
    ]
    if not any(isinstance(value, LowRank) for value, _ in pairs):
        return [first]
    second = [
        dot.replace(base=jnp.zeros_like(value.base), a=value.a, keys=None)
        if isinstance(value, LowRank)
        else jnp.zeros_like(dot)
        for value, dot in pairs
    ]
    return [first, second]


@rule("scan", passes=True)
def scan(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Scan again: stacked weights are sliced with their factors, others are closed over."""
    params = eqn.params
    num_consts, num_carry = compat.scan_counts(params)
    consts, carry = values[:num_consts], list(values[num_consts : num_consts + num_carry])
    xs = [_one_axis_first(walk, eqn, x) for x in values[num_consts + num_carry :]]
    has_dropout = any(isinstance(v, LowRank) and v.keys is not None for v in (*consts, *carry))

    def body(carry, sliced):
        step, slices = sliced
        held = [_fresh_dropout(value, step) for value in (*consts, *carry)]
        entries = [_entry(x, part) for x, part in zip(xs, slices, strict=True)]
        outs = walk.run(params["jaxpr"], *held, *entries)
        ys = [_as_stacked(walk, eqn, y) for y in outs[num_carry:]]
        return _as_carried(walk, eqn, carry, outs[:num_carry]), ys

    steps = jnp.arange(params["length"]) if has_dropout else None
    sliced = (steps, [_scanned(x) for x in xs])
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sliced)
    final, ys = lax.scan(
        body,
        _settled(walk, eqn, lambda carry, x: body(carry, x)[0], carry, first),
        sliced,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*final, *(_stacked(y, xs, params["length"]) for y in ys)]


@rule("while", passes=True)
def while_loop(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Loop again, with weights closed over or carried unchanged."""
    params = eqn.params
    ends = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = (
        values[: ends[0]],
        values[ends[0] : ends[1]],
        values[ends[1] :],
    )

    def body(carry):
        outs = walk.run(params["body_jaxpr"], *body_consts, *carry)
        return _as_carried(walk, eqn, carry, outs)

    return lax.while_loop(
        lambda carry: walk.run(params["cond_jaxpr"], *cond_consts, *carry)[0],
        body,
        _settled(walk, eqn, body, list(carry)),
    )


@rule("cond", passes=True)
def cond(walk: Walk, eqn: Any, index: Any, *operands: Any) -> list[Any]:
    """Switch again; a weight leaves it as one if it does so from every branch."""
    branches = [
        lambda *operands, jaxpr=jaxpr: walk.run(jaxpr, *operands)
        for jaxpr in eqn.params["branches"]
    ]
    kinds = [[_kind(out) for out in jax.eval_shape(f, *operands)] for f in branches]
    agree = [len(set(of_output)) == 1 for of_output in zip(*kinds, strict=True)]

    def agreeing(branch):
        def run(*operands):
            reason = "the branches disagree on whether it is a weight"
            outs = zip(branch(*operands), agree, strict=True)
            return [out if same else walk.densify(eqn, out, reason) for out, same in outs]

        return run

    branches = [agreeing(branch) for branch in branches]
    if (platforms := eqn.params.get("branches_platforms")) is None:
        return lax.switch(index, branches, *operands)
    chosen: dict[str, Any] = {}  # by `lax.platform_dependent`, where each is lowered for its own
    for names, branch in zip(platforms, branches, strict=True):
        chosen |= dict.fromkeys(names or ["default"], branch)
    return lax.platform_dependent(*operands, **chosen)


def _as_stacked(walk: Walk, eqn: Any, y: Any) -> Any:
    """Return an output of a step as the loop can stack it: rows, and what is not aligned, made."""
    if isinstance(y, LowRank):
        if y.is_rows():
            return walk.densify(eqn, y, "")
        return y.replace(base=_as_stacked(walk, eqn, y.base))
    return y if isinstance(y, Deferred) and y.is_aligned else deferred.now(y)


def _one_axis_first(walk: Walk, eqn: Any, x: Any) -> Any:
    """Return what is scanned, dense if its first dimension is of several axes."""
    if isinstance(x, LowRank) and len(x.dims[0]) > 1:
        return walk.densify(eqn, x, "it is scanned over several axes at once")
    base = getattr(x, "base", x)
    if isinstance(base, Deferred) and not base.is_scannable():
        return x.replace(base=deferred.now(base)) if isinstance(x, LowRank) else deferred.now(x)
    return x


def _scanned(x: Any) -> Any:
    """Return the arrays of a value that have the scanned axis first."""
    if not isinstance(x, LowRank):
        return x
    label = x.labels(0)
    carried = [name for name, carries in CARRIES.items() if label and label <= carries]
    parts = {name: getattr(x, name) for name in ("base", *carried)}
    return {name: part for name, part in parts.items() if part is not None}


def _entry(x: Any, part: Any) -> Any:
    """Return one entry of a scanned value."""
    if isinstance(x, LowRank):
        return x.entry().replace(**{**part, "base": _entry(x.base, part["base"])})
    return part.entry() if isinstance(part, Deferred) else part


def _stacked(y: Any, xs: Sequence[Any], length: int) -> Any:
    """Return a value that left a scan with the new first dimension on its books."""
    if isinstance(y, Deferred):
        return y.stacked()
    if not isinstance(y, LowRank):
        return y
    y = y.replace(base=_stacked(y.base, (), length))
    source = [x for x in xs if isinstance(x, LowRank) and x.origin == y.origin]
    label = source[0].labels(0) if source and y.is_probe else frozenset()
    stacked = y.replace(dims=((), *y.dims), scanned=y.scanned - label)
    if length != 1 or y.is_probe:
        first = ((label if y.is_probe else Role.STACK, length),)
        return stacked.replace(dims=(first, *y.dims))
    return stacked.reshaped(y.base, stacked.dims)


def _fresh_dropout(value: Any, step: Any) -> Any:
    """Return a value with another dropout mask for each step of a loop."""
    if not isinstance(value, LowRank) or value.keys is None:
        return value
    keys = jax.vmap(jax.random.fold_in, (0, None))(value.keys.reshape(-1), step)
    return value.replace(keys=keys.reshape(value.keys.shape))


def _as_carried(walk: Walk, eqn: Any, carry: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """Return the outputs of a step, dense where what was carried in is."""
    pairs = zip(carry, outs, strict=True)
    reason = "a loop carries it where an array was"
    return [o if _is_carried(c) else walk.densify(eqn, o, reason) for c, o in pairs]


def _is_carried(value: Any) -> bool:
    return isinstance(value, LowRank | Deferred)


def _settled(walk: Walk, eqn: Any, step: Any, carry: list[Any], *xs: Any) -> list[Any]:
    """Return the initial carry, dense where a step does not give a weight back as it came."""
    while any(map(_is_carried, carry)):
        outs = jax.eval_shape(step, carry, *xs)
        changed = [
            _is_carried(value) and _kind(value) != _kind(out)
            for value, out in zip(carry, outs, strict=True)
        ]
        if not any(changed):
            break
        reason = "a loop carries it and changes it"
        pairs = zip(carry, changed, strict=True)
        carry = [walk.densify(eqn, value, reason) if new else value for value, new in pairs]
    return carry


def _kind(value: Any) -> Any:
    """Return what two values must share to stand in one place of a carry or an output."""
    leaves, treedef = jax.tree.flatten(value)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
