"""Rules for loops: a scan or a while loop is run again around an evaluation of its body.

A low-rank weight is a pytree, so it is carried, sliced and stacked like any array. What a step
gives back in another form than it took is made dense before the loop.
"""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.registry import rule
from jaxlora.tracing.types import Base, Eqn, Value, Values
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.weight import Weight, base_of
from jaxlora.types import PyTree


@rule("scan", passes=True, times=lambda eqn: eqn.params["length"])
def scan(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
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
def while_loop(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
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

    is_batched = compat.shape(compat.opened(params["cond_jaxpr"]).outvars[0]) != ()

    def goes_on(carry):
        (going,) = run.inner(eqn, params["cond_jaxpr"], *cond_consts, *carry)
        return run.densify(eqn, going, "a loop goes on by it")

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


def _where(run: Evaluation, eqn: Eqn, going: jax.Array, new: Value, old: Value) -> Value:
    """Return new values in the examples in which a loop is going on, and old ones in the others."""
    if new is old:
        return old
    reason = "a loop changes it in some examples"
    new, old = run.densify(eqn, new, reason), run.densify(eqn, old, reason)
    return jnp.where(going.reshape(going.shape + (1,) * (jnp.ndim(new) - going.ndim)), new, old)


def _as_stacked(run: Evaluation, eqn: Eqn, y: Value) -> Value:
    """Return an output of a step as the loop can stack it: rows, and what is not aligned, made."""
    if isinstance(y, Weight):
        if y.is_rows():
            return run.densify(eqn, y, "")
        return y.replace(base=_as_stacked(run, eqn, y.base))
    return y if isinstance(y, Deferred) and y.is_aligned else deferred.now(y)


def _one_axis_first(run: Evaluation, eqn: Eqn, x: Value) -> Value:
    """Return what is scanned, dense if its first dimension is of several axes."""
    if isinstance(x, Weight) and len(x.dims[0]) > 1:
        return run.densify(eqn, x, "it is scanned over several axes at once")
    base = base_of(x)
    if isinstance(base, Deferred) and not base.is_scannable():
        return x.replace(base=deferred.now(base)) if isinstance(x, Weight) else deferred.now(x)
    return x


def _scanned(x: Value) -> Base | dict[str, Base]:
    """Return the arrays of a value that have the scanned axis first."""
    if not isinstance(x, Weight):
        return x
    label = x.labels(0)
    arrays = x.arrays().items()
    return {"base": x.base} | {n: part for n, part in arrays if label and label <= x.carries[n]}


def _entry(x: Value, part: PyTree) -> Value:
    """Return one entry of a scanned value."""
    if isinstance(x, Weight):
        return x.entry().replace(**{**part, "base": _entry(x.base, part["base"])})
    return part.entry() if isinstance(part, Deferred) else part


def _stacked(y: Value, xs: Values, length: int) -> Value:
    """Return a value that left a scan with the new first dimension in its bookkeeping."""
    if isinstance(y, Deferred):
        return y.stacked()
    if not isinstance(y, Weight):
        return y
    y = y.replace(base=_stacked(y.base, (), length))
    return y.stacked(length, [x for x in xs if isinstance(x, Weight)])


def _fresh_dropout(value: Value, step: jax.Array | None) -> Value:
    """Return a value with another dropout mask for each step of a loop."""
    if not isinstance(value, LowRank) or value.keys is None or step is None:
        return value
    keys = jax.vmap(jax.random.fold_in, (0, None))(value.keys.reshape(-1), step)
    return value.replace(keys=keys.reshape(value.keys.shape))


def _as_carried(run: Evaluation, eqn: Eqn, carry: Values, outs: Values) -> Values:
    """Return the outputs of a step, dense where what was carried in is."""
    pairs = zip(carry, outs, strict=True)
    reason = "a loop carries it where an array was"
    return [o if _is_carried(c) else run.densify(eqn, o, reason) for c, o in pairs]


def _is_carried(value: Value) -> bool:
    return isinstance(value, Weight | Deferred)


def _settled(
    run: Evaluation, eqn: Eqn, step: Callable[..., Values], carry: Values, *xs: object
) -> Values:
    """Return the initial carry, dense where a step does not give a weight back as it came."""
    while any(map(_is_carried, carry)):
        outs = jax.eval_shape(step, carry, *xs)
        changed = [
            _is_carried(value) and signature(value) != signature(out)
            for value, out in zip(carry, outs, strict=True)
        ]
        if not any(changed):
            break
        reason = "a loop carries it and changes it"
        pairs = zip(carry, changed, strict=True)
        carry = [run.densify(eqn, value, reason) if new else value for value, new in pairs]
    return carry


def signature(value: Value) -> Hashable:
    """Return what two values must share to stand in one place of a carry or an output."""
    leaves, treedef = jax.tree.flatten(value)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
