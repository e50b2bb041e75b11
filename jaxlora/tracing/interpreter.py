"""Evaluate a program with low-rank weights among its values.

The program is a jaxpr. An equation without a low-rank weight among its inputs runs as it is. One
with goes to the rule of its primitive, see `jaxlora.tracing.registry`. Where there is no rule, or
the rule does not cover the case, the weight is made dense: correct, and never silent.

A function from `jaxlora.lora` holds an `Evaluator`, which says how programs are evaluated and
knows nothing of any of them. Each run of a program, of an inner one too, makes an `Evaluation`,
which is handed to the rules and ends with the run. So one function serves many threads.
"""

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Callable
from typing import Unpack

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat, cost, dataflow, repeats, sharing, sums
from jaxlora.tracing.jaxprs.compat import Var
from jaxlora.tracing.options import Options
from jaxlora.tracing.recorder import Facts, Kind, Recorder
from jaxlora.tracing.types import Base, Eqn, Jaxpr, Traced, Value, Values
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.chain import CHECKPOINT_NAME
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.weight import Weight, base_of
from jaxlora.weights.adapters import merge_dtype

WarningKey = str | tuple[str, type[Warning], int]  # of `warnings`


class MaterializationWarning(UserWarning):
    """An adapted weight was made dense, because an operation has no low-rank rule."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates programs by some options; of those it has evaluated it holds nothing.

    Attributes:
        options: how programs are evaluated.
        recorder: what writes down the uses of weights, or None where they are not wanted.
        warned: the registry of `warnings`: each line is warned of once.
        compiled: by inner program the function that evaluates it under `jax.jit`, so that it is
            compiled once; it goes when the program goes.
    """

    options: Options = dataclasses.field(default_factory=Options)
    recorder: Recorder | None = None
    warned: dict[WarningKey, int] = dataclasses.field(default_factory=dict)
    compiled: weakref.WeakKeyDictionary[Traced, Callable[..., Values]] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary
    )

    def run(self, jaxpr: Traced, *args: Value, line: str = "") -> list[Value]:
        """Evaluate a jaxpr on arrays and low-rank weights.

        Args:
            jaxpr: the program.
            *args: its inputs.
            line: the user's line that calls it, for what stands in it at none.
        """
        return self.run_open(jaxpr, compat.consts(jaxpr), *args, line=line)

    def run_open(self, jaxpr: Traced, consts: Values, *args: Value, line: str = "") -> list[Value]:
        """Evaluate a jaxpr on other constants than its own."""
        return Evaluation(self, compat.opened(jaxpr), consts, args, line).outputs()

    def jitted(self, jaxpr: Traced, name: str, line: str) -> Callable[..., Values]:
        """Return a function of the constants and inputs of a jaxpr that is compiled by `jax.jit`.

        The constants are inputs of it, so that no compiled program has a copy of them.
        """
        found = self.compiled.get(jaxpr)
        if found is None:
            known = weakref.ref(jaxpr)

            def evaluate(consts, *values):
                program = known()
                assert program is not None  # whoever calls this has it
                return self.run_open(program, consts, *values, line=line)

            evaluate.__name__ = evaluate.__qualname__ = name
            found = self.compiled.setdefault(jaxpr, jax.jit(evaluate))
        return found

    def derivative(self) -> "Evaluator":
        """Return an evaluator as this, for programs that have to stay linear."""
        options = dataclasses.replace(self.options, is_linear=True, observes=False)
        return dataclasses.replace(self, options=options, compiled=weakref.WeakKeyDictionary())

    def densify(
        self, eqn: Eqn | None, where: tuple[str, str], value: Value, reason: str
    ) -> jax.Array:
        """Return an array for a value that reaches an operation, see `Evaluation.densify`."""
        if not isinstance(value, Weight):
            return deferred.now(value)
        is_rows, dtype = value.is_rows(), value.base.dtype
        if self.recorder is not None and is_rows:
            self.recorder.record_lookup(eqn, value)
        elif self.recorder is not None:
            self.recorder.record(eqn, where, value, Kind.MATERIALIZED, reason=reason)
        if not is_rows:
            self.warn(where, value, reason)
            dtype = merge_dtype(dtype)
        with self.scope(value):
            return value.dense(dtype)

    def leave(self, out: Value, reason: str = "") -> Value:
        """Return what leaves a program, an array for rows, and for a weight if there is a reason.

        Args:
            out: an output.
            reason: why a weight cannot leave as one.
        """
        if isinstance(out, Weight) and (reason or out.is_rows()):
            return self.densify(None, compat.where(None), out, reason)
        return out

    def scope(self, *weights: Weight) -> contextlib.AbstractContextManager[object]:
        """Return the name scope of what is added to a program for some weights."""
        if self.recorder is None:
            return jax.named_scope(CHECKPOINT_NAME)
        paths = tuple(path for weight in weights for path in weight.origin.paths)
        return jax.named_scope(cost.scope(self.recorder.number(paths)))

    def warn(self, where: tuple[str, str], weight: Weight, reason: str) -> None:
        """Warn that a weight is made dense, once for each line, or raise if that is asked for."""
        if self.recorder is not None:
            return
        what = f"the weight {weight.name!r} reaches {where[0]!r} at {where[1]}, and {reason}"
        if self.options.strict:
            raise ValueError(f"{what}: strict=True needs a low-rank rule at every use")
        warnings.warn_explicit(
            f"{what}: it is materialized there",
            MaterializationWarning,
            *compat.file_and_number(where[1]),
            registry=self.warned,
        )


class Evaluation:
    """One run of a program, and what its rules may ask and do.

    Attributes:
        evaluator: how it is evaluated.
        options: those of the evaluator.
        repeats: the functions for equations that come again.
        env: values of the variables, as long as they are read.
        plan: the products that read one input, see `sharing.Plan`.
        values: what the variables stand for, see `dataflow.values`.
        varying: along which dimensions predicates vary, see `dataflow.varying`.
        last: the last product with a weight that was made for it, see `deferred.product`.
        narrowed: by product and side of its weight, that of its input and the first factor, and
            how many products share it, where it was made for several at the first of them.
        splits: by product the reshape after which its term is added, see `sums.splits`.
        late: by reshape what products before it left to be done to its result.
    """

    def __init__(
        self, evaluator: Evaluator, program: Jaxpr, consts: Values, args: Values, line: str
    ):
        self.evaluator, self.options, self._line = evaluator, evaluator.options, line
        self._program, self.plan = program, sharing.plan(program)
        self.repeats = repeats.Repeats()
        self.env: dict[Var, Value] = dict(zip(program.constvars, consts, strict=True))
        self.env.update(zip(program.invars, args, strict=True))
        self.values, self.varying = dataflow.values(program), dataflow.varying(program)
        self.last: jax.Array | None = None
        self.narrowed: dict[tuple[Eqn, int], tuple[jax.Array, int]] = {}
        self.splits = sums.splits(program)
        self.late: dict[Eqn, list[Callable[[jax.Array], jax.Array]]] = {}

    def outputs(self) -> list[Value]:
        """Run every equation, and return the outputs; what was computed on the way is let go."""
        env, eqns, outvars = self.env, self.plan.eqns, self._program.outvars
        last = dataflow.last_uses(eqns, outvars)

        def is_array(var):
            return not isinstance(env[var], Weight | Deferred)

        try:
            for run in repeats.runs(eqns, is_array, alone={*self.splits.values()}):
                gone = {var for eqn in run for var in last.get(eqn, ())}
                if len(run) > 1:
                    env.update(self.repeats.run(run, env, gone))
                else:
                    (eqn,) = run
                    values = [compat.read(atom, env) for atom in eqn.invars]
                    with compat.scope(eqn):
                        outs = self._with_late(eqn, self._step(eqn, values))
                    env.update(zip(eqn.outvars, outs, strict=True))
                for var in gone:
                    env.pop(var, None)
            return [compat.read(atom, env) for atom in outvars]
        finally:  # functions that rules hand to JAX may outlive the run, and hold this
            env.clear()
            self.last = None

    def _with_late(self, eqn: Eqn, outs: Values) -> Values:
        """Return the outputs of an equation after what products before it left to be done."""
        for change in self.late.pop(eqn, ()):
            (y,) = outs  # the reshape of a product, or of its sum with a weight
            base = change(deferred.now(base_of(y)))
            outs = [y.replace(base=base) if isinstance(y, Weight) else base]
        return outs

    def _step(self, eqn: Eqn, values: list[Value]) -> Values:
        weights = [value for value in values if isinstance(value, Weight)]
        others = [value for value in values if not isinstance(value, Weight)]
        arrays = [value for value in others if not isinstance(value, Deferred)]
        if len(arrays) == len(values):
            return compat.bind(eqn, arrays)
        known = registry.primitive(eqn)
        sizes = [compat.size(var) for var in eqn.outvars]
        if sizes and not any(sizes):  # nothing of a weight
            bases = [base_of(value) for value in values]
            return compat.bind(eqn, [*map(deferred.now, bases)])
        if not weights and known.deferred:
            return [deferred.bind(eqn, others)]
        if not weights and not known.passes:
            return deferred.read(eqn, others, self.product)
        if not known.passes:
            values = [deferred.now(v) if isinstance(v, Deferred) else v for v in values]
        if known.rule is None:
            return self.without_rule(eqn, values, "it has no low-rank rule")
        return known.rule(self, eqn, *values)

    def inner(self, eqn: Eqn, jaxpr: Traced, *args: Value) -> list[Value]:
        """Evaluate a program that stands in an equation of this."""
        return self.evaluator.run(jaxpr, *args, line=self.where(eqn)[1])

    def jitted(self, eqn: Eqn, jaxpr: Traced, *args: Value) -> Values:
        """Do as `inner` does, under `jax.jit` and the name of the equation."""
        evaluate = self.evaluator.jitted(jaxpr, eqn.params["name"], self.where(eqn)[1])
        return evaluate(compat.consts(jaxpr), *args)

    def where(self, eqn: Eqn) -> tuple[str, str]:
        """Return the operation of an equation, and the user's line that runs it.

        In a function of JAX, whose equations know the line that called it first, that calls it now.
        """
        operation, line = compat.where(eqn)
        lines = (self._line, line) if compat.is_of_jax(self._program) else (line, self._line)
        return operation, next(filter(None, lines), "an unknown line")

    def named(self, h: jax.Array) -> jax.Array:
        """Name a rank-sized product, so that a policy of `jax.checkpoint` can keep it."""
        return h if self.options.is_linear else checkpoint_name(h, CHECKPOINT_NAME)

    def without_rule(self, eqn: Eqn, values: Values, reason: str) -> list[jax.Array]:
        """Run an equation with every low-rank weight among its inputs made dense."""
        return compat.bind(eqn, [self.densify(eqn, value, reason) for value in values])

    def densify(self, eqn: Eqn, value: Value, reason: str) -> jax.Array:
        """Return an array for a value; say so if that is a weight and not rows of it."""
        return self.evaluator.densify(eqn, self.where(eqn), value, reason)

    def product(
        self, function: Callable[..., jax.Array], x: jax.Array, w: Base, *others: jax.Array
    ) -> jax.Array:
        """Return a function, linear in x, of it and a weight, which is made for it if deferred."""
        if not isinstance(w, Deferred):
            return function(x, w, *others)
        self.last = deferred.product(function, x, w, *others, after=self.last)
        return self.last

    def made(self, eqn: Eqn, value: Value) -> Value:
        """Return a value that is not deferred; say so, for it will be kept as it is made here."""
        if isinstance(value, Weight) and isinstance(value.base, Deferred):
            reason = "it is dequantized for a function with its own derivative"
            self.evaluator.warn(self.where(eqn), value, reason)
            return value.replace(base=deferred.now(value.base))
        return value

    def scope(self, *weights: Weight) -> contextlib.AbstractContextManager[object]:
        """Return the name scope of what is added to the program for some weights."""
        return self.evaluator.scope(*weights)

    def record(self, eqn: Eqn, weight: Weight, kind: Kind, **facts: Unpack[Facts]) -> None:
        """Record a use of a weight, see `Recorder.record`."""
        if (recorder := self.evaluator.recorder) is not None:
            recorder.record(eqn, self.where(eqn), weight, kind, **facts)
