"""Rules for inner programs and branches: the construct is rebuilt around an evaluation of its body.

A low-rank weight is a pytree, so it enters and leaves a rebuilt construct like any array. The
public functions of JAX rebuild them, so that differentiation, batching and compilation are
JAX's own.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from jaxlora.tracing.interpreter import Evaluation, evaluate
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.keys import Part
from jaxlora.tracing.registry import rule
from jaxlora.tracing.rules.loops import signature
from jaxlora.tracing.rules.meshes import constrained
from jaxlora.tracing.types import Eqn, Value, Values
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.chain import CHECKPOINT_NAME
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.weight import Weight, base_of


@rule(*compat.JIT, passes=True)
def jit(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Compile the inner program again, under its name and with its shardings."""
    params = eqn.params
    values = tuple(map(constrained, values, params["in_shardings"]))

    def repeated(*values):
        return run.jitted(eqn, params["jaxpr"], *values)

    outs = _once_for_all(run, eqn, repeated, *values)
    return [*map(constrained, outs, params["out_shardings"])]


@rule("closed_call", "core_call", passes=True)
def call(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Run the inner program in place."""
    return run.inner(eqn, eqn.params["call_jaxpr"], *values)


@rule(*compat.REMAT, passes=True)
def remat(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Rematerialize the evaluation of the inner program, with the same policy.

    Where the program has none, the rank-sized products are kept: to make them again would read
    their inputs again, which are larger by in-size over rank.
    """
    program, scopes = compat.unscoped(eqn.params["jaxpr"])
    params = {**eqn.params, "jaxpr": program}
    policy = params["policy"] or jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME)

    def repeated(*values):
        line = run.where(eqn)[1]
        return evaluate(run.evaluator.rematerialized, program, *values, line=line)

    again = jax.checkpoint(repeated, prevent_cse=params["prevent_cse"], policy=policy)
    with scopes:
        return _once_for_all(run, eqn.replace(params=params), again, *values)


def _once_for_all(
    run: Evaluation, eqn: Eqn, function: Callable[..., Values], *values: Value
) -> Values:
    """Return what a function does that stands for an equation, by one for all that do the same."""
    outs = run.shared(Part.of([eqn], gone=()), function, *values)
    return function(*values) if outs is None else outs


@rule("custom_jvp_call")
def custom_jvp_call(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Keep the function's own derivative, evaluated with low-rank weights as well.

    The tangent of a low-rank weight is the sum of two, ``da b`` and ``a db``.
    """

    def dense(outs):
        return [
            run.densify(eqn, out, "it leaves a function with its own derivative") for out in outs
        ]

    has_gain = [isinstance(value, LowRank) and value.gain is not None for value in values]
    reason = "it has a magnitude, and the function its own derivative"
    values = tuple(
        run.densify(eqn, value, reason) if has else run.made(eqn, value)
        for value, has in zip(values, has_gain, strict=True)
    )

    @jax.custom_jvp
    def function(values):
        return dense(run.inner(eqn, eqn.params["call_jaxpr"], *values))

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
            evaluate(run.evaluator.derivative(), program, *values, *moving)
            for moving in _tangents([(values[i], dots[i]) for i in moves])
        )
        outs = dense(outs)
        primal, tangent = outs[: len(outs) // 2], outs[len(outs) // 2 :]
        for part in parts:
            tangent = jax.tree.map(jnp.add, tangent, dense(part)[len(tangent) :])
        return primal, tangent

    return function(list(values))


def _base(value: Value) -> jax.Array:
    base = deferred.now(base_of(value))
    return base if isinstance(value, Weight) else jnp.asarray(base)


def _tangents(pairs: Sequence[tuple[Value, Value]]) -> list[Values]:
    """Return tangents whose sum is that of the values, each linear in what moves.

    The tangent of ``a b`` is ``da b + a db``: two weights of the same rank, for a derivative that
    has to stay linear.
    """
    first = [
        dot.replace(b=value.b, keys=value.keys)
        if isinstance(value, LowRank) and isinstance(dot, LowRank)
        else dot
        for value, dot in pairs
    ]
    if not any(isinstance(value, LowRank) for value, _ in pairs):
        return [first]
    second = [
        dot.replace(base=jnp.zeros_like(value.base), a=value.a, keys=value.keys)
        if isinstance(value, LowRank) and isinstance(dot, LowRank)
        else jnp.zeros_like(deferred.now(base_of(dot)))
        for value, dot in pairs
    ]
    return [first, second]


@rule("cond", passes=True)
def cond(run: Evaluation, eqn: Eqn, index: Value, *operands: Value) -> Values:
    """Switch again; a weight leaves it as one if it does so from every branch."""
    branches = [
        lambda *operands, jaxpr=jaxpr: run.inner(eqn, jaxpr, *operands)
        for jaxpr in eqn.params["branches"]
    ]
    outs = [jax.eval_shape(branch, *operands) for branch in branches]
    agree = [len({*map(signature, same)}) == 1 for same in zip(*outs, strict=True)]

    def agreeing(branch):
        def agreed(*operands):
            reason = "the branches disagree on whether it is a weight"
            outs = zip(branch(*operands), agree, strict=True)
            return [out if same else run.densify(eqn, out, reason) for out, same in outs]

        return agreed

    branches = [agreeing(branch) for branch in branches]
    if (platforms := eqn.params.get("branches_platforms")) is None:
        return lax.switch(index, branches, *operands)
    chosen: dict[
        str, Callable[..., Values]
    ] = {}  # by `lax.platform_dependent`, where each is lowered for its own
    for names, branch in zip(platforms, branches, strict=True):
        chosen |= dict.fromkeys(names or ["default"], branch)
    return lax.platform_dependent(*operands, **chosen)
