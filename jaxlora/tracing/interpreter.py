"""Evaluate a program with low-rank weights among its values.

The program is a jaxpr. An equation without a low-rank weight among its inputs runs as it is. One
with goes to the rule of its primitive; a rule is a function registered here by primitive name,
``rule(run, eqn, *values) -> list of outputs``. Where there is no rule, or the rule does not
cover the case, the weight is made dense: correct, and never silent.

A function from `jaxlora.lora` holds an `Evaluator`, which says how programs are evaluated and
knows nothing of any of them. Each run of a program, of an inner one too, makes an `Evaluation`,
which is handed to the rules and ends with the run. So one function serves many threads.
"""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlora.tracing.jaxprs import compat, cost, dataflow, sharing
from jaxlora.tracing.recorder import LOOKED_UP, MATERIALIZED, Recorder
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.chain import CHECKPOINT_NAME
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.weights.adapters import merge_dtype

Rule = Callable[..., list[Any]]
_RULES: dict[str, Rule] = {}
_PASSING: set[str] = set()  # the primitives whose rules pass on what is deferred

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
Form = Literal["auto", "factored", "weight-side"]


class MaterializationWarning(UserWarning):
    """An adapted weight was made dense, because an operation has no low-rank rule."""


def rule(*primitives: str, passes: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of the primitives of these names; it may pass on what is deferred."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, function))
        _PASSING.update(primitives if passes else ())
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Options:
    """How programs are evaluated.

    Attributes:
        strict: raise where a weight would be materialized.
        form: form of the products, see `jaxlora.tracing.products.forms`.
        observes: products tell of their inputs and have no low-rank term, see
            `jaxlora.tracing.transform.observe`.
        is_linear: the program is a derivative, to be transposed, and so nothing in it is named.
    """

    strict: bool = False
    form: Form = "auto"
    observes: bool = False
    is_linear: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates programs by some options; of those it has evaluated it holds nothing.

    Attributes:
        options: how programs are evaluated.
        recorder: what writes down the uses of weights, or None where they are not wanted.
        told: the registry of `warnings`: each line is told of once.
        compiled: by inner program the function that evaluates it under `jax.jit`, so that it is
            compiled once; it goes when the program goes.
    """

    options: Options = Options()
    recorder: Recorder | None = None
    told: dict[Any, Any] = dataclasses.field(default_factory=dict)
    compiled: Any = dataclasses.field(default_factory=weakref.WeakKeyDictionary)

    def run(self, jaxpr: Any, *args: Any, line: str = "") -> list[Any]:
        """Evaluate a jaxpr on arrays and low-rank weights.

        Args:
            jaxpr: the program.
            *args: its inputs.
            line: the user's line that calls it, for what stands in it at none.
        """
        return self.run_open(jaxpr, compat.consts(jaxpr), *args, line=line)

    def run_open(self, jaxpr: Any, consts: Sequence[Any], *args: Any, line: str = "") -> list[Any]:
        """Evaluate a jaxpr on other constants than its own."""
        return Evaluation(self, compat.opened(jaxpr), consts, args, line).outputs()

    def jitted(self, jaxpr: Any, name: str, line: str) -> Callable[..., Any]:
        """Return a function of the constants and inputs of a jaxpr that is compiled by `jax.jit`.

        The constants are inputs of it, so that no compiled program has a copy of them.
        """
        found = self.compiled.get(jaxpr)
        if found is None:
            known = weakref.ref(jaxpr)  # there whenever it is called: the caller has it

            def evaluate(consts, *values):
                return self.run_open(known(), consts, *values, line=line)

            evaluate.__name__ = evaluate.__qualname__ = name
            found = self.compiled.setdefault(jaxpr, jax.jit(evaluate))
        return found

    def derivative(self) -> "Evaluator":
        """Return an evaluator as this, for programs that have to stay linear."""
        options = dataclasses.replace(self.options, is_linear=True, observes=False)
        return dataclasses.replace(self, options=options, compiled=weakref.WeakKeyDictionary())

    def densify(self, eqn: Any, where: tuple[str, str], value: Any, reason: str) -> Any:
        """Return an array for a value that reaches an operation, see `Evaluation.densify`."""
        if not isinstance(value, LowRank):
            return deferred.now(value)
        kind = LOOKED_UP if value.is_rows() else MATERIALIZED
        if self.recorder is not None:
            fields = {} if value.is_rows() else {"reason": reason, "stack": frozenset()}
            self.recorder.record(eqn, where, value, kind, **fields)
        if not value.is_rows():
            self.complain(where, value, reason)
        if value.is_probe:
            return value.base
        dtype = value.base.dtype if value.is_rows() else merge_dtype(value.base.dtype)
        with self.scope(value):
            return value.dense(dtype)

    def left(self, out: Any, reason: str = "") -> Any:
        """Return what leaves a program, an array for rows, and for a weight if there is a reason.

        Args:
            out: an output.
            reason: why a weight cannot leave as one.
        """
        if isinstance(out, LowRank) and (reason or out.is_rows()):
            return self.densify(None, compat.where(None), out, reason)
        return out

    def scope(self, *weights: LowRank) -> Any:
        """Return the name scope of what is added to a program for some weights."""
        if self.recorder is None:
            return jax.named_scope(CHECKPOINT_NAME)
        paths = tuple(path for weight in weights for path in weight.origin.paths)
        return jax.named_scope(cost.scope(self.recorder.number(paths)))

    def complain(self, where: tuple[str, str], weight: LowRank, reason: str) -> None:
        """Warn that a weight is made dense, once for each line, or raise if that is asked for."""
        if weight.is_probe or self.recorder is not None:
            return
        path = " + ".join(weight.origin.paths)
        what = f"the weight {path!r} reaches {where[0]!r} at {where[1]}, and {reason}"
        if self.options.strict:
            raise ValueError(f"{what}: strict=True needs a low-rank rule at every use")
        warnings.warn_explicit(
            f"{what}: it is materialized there",
            MaterializationWarning,
            *compat.file_and_number(where[1]),
            registry=self.told,
        )


class Evaluation:
    """One run of a program, and what its rules may ask and do.

    Attributes:
        evaluator: how it is evaluated.
        options: those of the evaluator.
        env: values of the variables, as long as they are read.
        readers: the products that read one input, see `sharing.Plan`.
        values: what the variables stand for, see `dataflow.values`.
        varying: along which dimensions predicates vary, see `dataflow.varying`.
        last: the last product with a weight that was made for it, see `deferred.product`.
        narrowed: by id of an equation, the product of its input and the first factor, and how
            many equations share that, where it was made for several.
    """

    def __init__(
        self, evaluator: Evaluator, program: Any, consts: Sequence[Any], args: Any, line: str
    ):
        self.evaluator, self.options, self._line = evaluator, evaluator.options, line
        self._program, self._plan = program, sharing.plan(program)
        self.env = dict(zip(program.constvars, consts, strict=True))
        self.env.update(zip(program.invars, args, strict=True))
        self.readers = self._plan.readers
        self.values, self.varying = dataflow.values(program), dataflow.varying(program)
        self.last: Any = None
        self.narrowed: dict[int, tuple[Any, int]] = {}

    def outputs(self) -> list[Any]:
        """Run every equation, and return the outputs; what was computed on the way is let go."""
        env, outvars = self.env, self._program.outvars
        last = dataflow.last_uses(self._plan.eqns, outvars)

        def read(atom):
            return atom.val if isinstance(atom, compat.Literal) else env[atom]

        try:
            for i, eqn in enumerate(self._plan.eqns):
                values = [read(atom) for atom in eqn.invars]
                with compat.scope(eqn):
                    env.update(zip(eqn.outvars, self._step(eqn, values), strict=True))
                for var in last.get(i, ()):
                    env.pop(var, None)
            return [read(atom) for atom in outvars]
        finally:  # functions that rules hand to JAX may outlive the run, and hold this
            env.clear()
            self.last = None

    def _step(self, eqn: Any, values: list[Any]) -> list[Any]:
        kinds, name = {*map(type, values)}, eqn.primitive.name
        if not kinds & {LowRank, Deferred}:
            return compat.bind(eqn, values)
        if eqn.outvars and all(0 in var.aval.shape for var in eqn.outvars):  # nothing of a weight
            bases = [getattr(value, "base", value) for value in values]
            return compat.bind(eqn, [*map(deferred.now, bases)])
        if LowRank not in kinds and name in deferred.KEPT:
            return [deferred.bind(eqn, values)]
        if name not in _PASSING:
            if LowRank not in kinds:
                return self._read(eqn, values)
            values = [*map(deferred.now, values)]
        found = _RULES.get(name)
        if found is None:
            return self.without_rule(eqn, values, "it has no low-rank rule")
        return found(self, eqn, *values)

    def _read(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Run an equation that reads what is deferred, and no adapted weight."""
        is_deferred = [isinstance(value, Deferred) for value in values]
        if eqn.primitive.name in _PRODUCTS and sum(is_deferred) == 1 and True in is_deferred[:2]:
            side, others = is_deferred.index(True), values[2:]

            def function(x, w, *others):
                return compat.bind(eqn, [w, x, *others] if side == 0 else [x, w, *others])[0]

            return [self.product(function, values[1 - side], values[side], *others)]
        return deferred.read(lambda *values: compat.bind(eqn, values), *values)

    def inner(self, eqn: Any, jaxpr: Any, *args: Any) -> list[Any]:
        """Evaluate a program that stands in an equation of this."""
        return self.evaluator.run(jaxpr, *args, line=self.where(eqn)[1])

    def jitted(self, eqn: Any, jaxpr: Any, *args: Any) -> list[Any]:
        """Do as `inner` does, under `jax.jit` and the name of the equation."""
        evaluate = self.evaluator.jitted(jaxpr, eqn.params["name"], self.where(eqn)[1])
        return evaluate(compat.consts(jaxpr), *args)

    def where(self, eqn: Any) -> tuple[str, str]:
        """Return the operation of an equation, and the user's line that runs it.

        In a function of JAX, whose equations know the line that called it first, that calls it now.
        """
        operation, line = compat.where(eqn)
        lines = (self._line, line) if compat.is_of_jax(self._program) else (line, self._line)
        return operation, next(filter(None, lines), "an unknown line")

    def named(self, h: jax.Array) -> jax.Array:
        """Name a rank-sized product, so that a policy of `jax.checkpoint` can keep it."""
        return h if self.options.is_linear else checkpoint_name(h, CHECKPOINT_NAME)

    def without_rule(self, eqn: Any, values: Sequence[Any], reason: str) -> list[Any]:
        """Run an equation with every low-rank weight among its inputs made dense."""
        return compat.bind(eqn, [self.densify(eqn, value, reason) for value in values])

    def densify(self, eqn: Any, value: Any, reason: str) -> Any:
        """Return an array for a value; say so if that is a weight and not rows of it."""
        return self.evaluator.densify(eqn, self.where(eqn), value, reason)

    def product(self, function: Callable[..., Any], x: Any, w: Any, *others: Any) -> Any:
        """Return a function, linear in x, of it and a weight, which is made for it if deferred."""
        if not isinstance(w, Deferred):
            return function(x, w, *others)
        self.last = deferred.product(function, x, w, *others, after=self.last)
        return self.last

    def made(self, eqn: Any, value: Any) -> Any:
        """Return a value that is not deferred; say so, for it will be kept as it is made here."""
        if isinstance(value, LowRank) and isinstance(value.base, Deferred):
            reason = "it is dequantized for a function with its own derivative"
            self.evaluator.complain(self.where(eqn), value, reason)
            return value.replace(base=deferred.now(value.base))
        return value

    def scope(self, *weights: LowRank) -> Any:
        """Return the name scope of what is added to the program for some weights."""
        return self.evaluator.scope(*weights)

    def record(self, eqn: Any, weight: LowRank, kind: str, **fields: Any) -> None:
        """Write down a use of a weight, see `Recorder.record`."""
        if (recorder := self.evaluator.recorder) is not None:
            recorder.record(eqn, self.where(eqn), weight, kind, **fields)
