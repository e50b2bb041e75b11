"""Rules for loops: a scan or a while loop is run again around an evaluation of its body.

A low-rank weight is a pytree, so it is carried, sliced and stacked like any array. What a step
gives back in another form than it took is made dense before the loop.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing.interpreter import Evaluation, rule
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import CARRIES, LowRank, Role


@rule("scan", passes=True)
def scan(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Scan again: stacked weights are sliced with their factors, others are closed over."""
    params = eqn.params
    num_consts, num_carry = compat.scan_counts(params)
    consts, carry = values[:num_consts], list(values[num_consts : num_consts + num_carry])
    xs = [_one_axis_first(run, eqn, x) for x in values[num_consts + num_carry :]]
    has_dropout = any(isinstance(v, LowRank) and v.keys is not None for v in (*consts, *carry))

    def body(carry, sliced):
        step, slices = sliced
        held = [_fresh_dropout(value, step) for value in (*consts, *carry)]
        entries = [_entry(x, part) for x, part in zip(xs, slices, strict=True)]
        outs = run.inner(eqn, params["jaxpr"], *held, *entries)
        ys = [_as_stacked(run, eqn, y) for y in outs[num_carry:]]
        return _as_carried(run, eqn, carry, outs[:num_carry]), ys

    steps = jnp.arange(params["length"]) if has_dropout else None
    sliced = (steps, [_scanned(x) for x in xs])
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sliced)
    final, ys = lax.scan(
        body,
        _settled(run, eqn, lambda carry, x: body(carry, x)[0], carry, first),
        sliced,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*final, *(_stacked(y, xs, params["length"]) for y in ys)]


@rule("while", passes=True)
def while_loop(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Loop again, with weights closed over or carried unchanged.

    Under `jax.vmap` the predicate may have an axis for the examples: the loop then goes on while
    one of them does, and what is carried of the others stays.
    """
    params = eqn.params
    ends = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = (
        values[: ends[0]],
        values[ends[0] : ends[1]],
        values[ends[1] :],
    )

    is_batched = compat.opened(params["cond_jaxpr"]).outvars[0].aval.ndim > 0

    def goes_on(carry):
        return run.inner(eqn, params["cond_jaxpr"], *cond_consts, *carry)[0]

    def body(carry):
        outs = run.inner(eqn, params["body_jaxpr"], *body_consts, *carry)
        if is_batched:
            going, pairs = goes_on(carry), zip(outs, carry, strict=True)
            outs = [_where(run, eqn, going, new, old) for new, old in pairs]
        return _as_carried(run, eqn, carry, outs)

    return lax.while_loop(
        (lambda carry: goes_on(carry).any()) if is_batched else goes_on,
        body,
        _settled(run, eqn, body, list(carry)),
    )


def _where(run: Evaluation, eqn: Any, going: Any, new: Any, old: Any) -> Any:
    """Return new values in the examples in which a loop is going on, and old ones in the others."""
    if new is old:
        return old
    reason = "a loop changes it in some examples"
    new, old = run.densify(eqn, new, reason), run.densify(eqn, old, reason)
    return jnp.where(going.reshape(going.shape + (1,) * (jnp.ndim(new) - going.ndim)), new, old)


def _as_stacked(run: Evaluation, eqn: Any, y: Any) -> Any:
    """Return an output of a step as the loop can stack it: rows, and what is not aligned, made."""
    if isinstance(y, LowRank):
        if y.is_rows():
            return run.densify(eqn, y, "")
        return y.replace(base=_as_stacked(run, eqn, y.base))
    return y if isinstance(y, Deferred) and y.is_aligned else deferred.now(y)


def _one_axis_first(run: Evaluation, eqn: Any, x: Any) -> Any:
    """Return what is scanned, dense if its first dimension is of several axes."""
    if isinstance(x, LowRank) and len(x.dims[0]) > 1:
        return run.densify(eqn, x, "it is scanned over several axes at once")
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


def _as_carried(run: Evaluation, eqn: Any, carry: Sequence[Any], outs: Sequence[Any]) -> list[Any]:
    """Return the outputs of a step, dense where what was carried in is."""
    pairs = zip(carry, outs, strict=True)
    reason = "a loop carries it where an array was"
    return [o if _is_carried(c) else run.densify(eqn, o, reason) for c, o in pairs]


def _is_carried(value: Any) -> bool:
    return isinstance(value, LowRank | Deferred)


def _settled(run: Evaluation, eqn: Any, step: Any, carry: list[Any], *xs: Any) -> list[Any]:
    """Return the initial carry, dense where a step does not give a weight back as it came."""
    while any(map(_is_carried, carry)):
        outs = jax.eval_shape(step, carry, *xs)
        changed = [
            _is_carried(value) and kind(value) != kind(out)
            for value, out in zip(carry, outs, strict=True)
        ]
        if not any(changed):
            break
        reason = "a loop carries it and changes it"
        pairs = zip(carry, changed, strict=True)
        carry = [run.densify(eqn, value, reason) if new else value for value, new in pairs]
    return carry


def kind(value: Any) -> Any:
    """Return what two values must share to stand in one place of a carry or an output."""
    leaves, treedef = jax.tree.flatten(value)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
