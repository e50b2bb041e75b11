"""Evaluate a program with low-rank weights among its values.

The program is a jaxpr. An equation without a low-rank weight among its inputs runs as it is. One
with goes to the rule of its primitive, see `jaxlora.tracing.registry`. Where there is no rule, or
the rule does not cover the case, the weight is made dense: correct, and never silent.

A function from `jaxlora.lora` holds an `Evaluator`, which says how programs are evaluated and
knows nothing of any of them. Each run of a program, of an inner one too, makes an `Evaluation`,
which is handed to the rules and ends with the run. So one function serves many threads.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, Unpack

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlora.tracing import registry
from jaxlora.tracing.evaluator import Evaluator
from jaxlora.tracing.jaxprs import compat, layers, repeats
from jaxlora.tracing.jaxprs.compat import Atom
from jaxlora.tracing.jaxprs.keys import Part
from jaxlora.tracing.jaxprs.known import Known
from jaxlora.tracing.jaxprs.repeats import Repeats
from jaxlora.tracing.recorder import Facts, Kind
from jaxlora.tracing.types import Base, Eqn, Traced, Value, Values
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.chain import CHECKPOINT_NAME
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.weight import NamelessWeightError, Weight, base_of

T = TypeVar("T")


def _is_weight(value: object) -> bool:
    return isinstance(value, Weight)


def evaluate(evaluator: Evaluator, jaxpr: Traced, *args: Value, line: str = "") -> list[Value]:
    """Evaluate a jaxpr on arrays and low-rank weights.

    Args:
        evaluator: how.
        jaxpr: the program.
        *args: its inputs.
        line: the user's line that calls it, for what stands in it at none.
    """
    return _evaluate(evaluator, jaxpr, compat.consts(jaxpr), *args, line=line)


def _evaluate(
    evaluator: Evaluator, jaxpr: Traced, consts: Values, *args: Value, line: str
) -> list[Value]:
    """Evaluate a jaxpr on other constants than its own."""
    known = Known(compat.opened(jaxpr))
    outs, _ = Evaluation(evaluator, known, known.whole, (*consts, *args), line).outputs()
    return outs


class Evaluation:
    """One run of a program or of a layer of it, and what its rules may ask and do.

    Attributes:
        evaluator: how it is evaluated.
        options: those of the evaluator.
        known: what is known of the program.
        repeats: the functions for equations that come again.
        env: values of the variables, as long as they are read.
        last: the last product with a weight that was made for it, see `deferred.product`.
        narrowed: by product and side of its weight, that of its input and the first factor, and
            how many products share it, where it was made for several at the first of them.
        late: by reshape what products before it left to be done to its result.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        known: Known,
        part: Part,
        values: Values,
        line: str,
        last: jax.Array | None = None,
    ):
        self.evaluator, self.options, self._line = evaluator, evaluator.options, line
        self.known, self._part, self.last = known, part, last
        can_share = evaluator.recorder is None and compat.is_staged()
        self.repeats = Repeats(known.keys, can_share)
        self.env: dict[Atom, Value] = dict(zip(part.inputs, values, strict=True))
        self.narrowed: dict[tuple[Eqn, int], tuple[jax.Array, int]] = {}
        self.late: dict[Eqn, list[Callable[[jax.Array], jax.Array]]] = {}

    def outputs(self) -> tuple[list[Value], jax.Array | None]:
        """Run every equation, and return the outputs and the last product; all else is let go."""
        try:
            for eqns, layer in self._pieces():
                if layer is None or not self._run_as_one(layer):
                    self._run(eqns)
            return [compat.read(atom, self.env) for atom in self._part.outputs], self.last
        finally:  # functions that rules hand to JAX may outlive the run, and hold this
            self.env.clear()
            self.last = None

    def _pieces(self) -> list[layers.Piece]:
        if not self.repeats.can_share:
            return [(self._part.eqns, None)]
        return self.known.pieces(self._part, self._is_array)

    def _is_array(self, atom: Atom) -> bool:
        return not isinstance(self.env.get(atom), Weight | Deferred)

    def _run(self, eqns: Sequence[Eqn]) -> None:
        """Run equations: one by one, but those together that read no weights."""
        env, scopes = self.env, self._part.scopes
        runs: Iterable[Sequence[Eqn]] = ([eqn] for eqn in eqns)
        if self.repeats.can_share:
            runs = repeats.runs(eqns, self._is_array, self.known.alone)
        for run in runs:
            if len(run) > 1:
                env.update(self.repeats.run(self.known.part(run), env, scopes))
            else:
                (eqn,) = run
                values = [compat.read(atom, env) for atom in eqn.invars]
                with compat.scope(slice(scopes, None), eqn):
                    outs = self._with_late(eqn, self._step(eqn, values))
                env.update(zip(eqn.outvars, outs, strict=True))
            self._let_go(run)

    def _let_go(self, eqns: Sequence[Eqn]) -> None:
        for var in self.known.gone(eqns):
            self.env.pop(var, None)

    def _run_as_one(self, layer: Part) -> bool:
        """Run a layer by the function for all that are equal, and tell whether there is one."""

        def repeated(last, *values):
            run = Evaluation(self.evaluator, self.known, layer, values, self._line, last)
            return run.outputs()

        values = [self.env[var] for var in layer.inputs]
        with compat.scope(slice(self._part.scopes, layer.scopes), *layer.eqns):
            found = self.shared(layer, repeated, self.last, *values)
        if found is None:
            return False
        outs, self.last = found
        self.env.update(zip(layer.outputs, outs, strict=True))
        self._let_go(layer.eqns)
        return True

    def shared(self, part: Part, function: Callable[..., T], *values: Value | None) -> T | None:
        """Return what the function does that stands for all equal parts, None if there is none.

        In it weights have no names. So there is none for parts that have to name a weight, or
        return one; nor where uses of weights are recorded, or for parts with effects.

        Args:
            part: the equations.
            function: does what they do.
            *values: what they read.
        """
        if any(eqn.effects for eqn in part.eqns):
            return None
        if (shared := self.repeats.shared(part, function)) is None:
            return None
        found: dict[object, int] = {}

        def nameless(weight):
            identity = weight.origin.paths, weight.origin.numbers
            return weight.nameless(found.setdefault(identity, len(found)))

        with contextlib.suppress(NamelessWeightError):
            outs = shared(*(nameless(v) if isinstance(v, Weight) else v for v in values))
            if not any(map(_is_weight, jax.tree.leaves(outs, is_leaf=_is_weight))):
                return outs
        self.repeats.tell_apart(part)
        return None

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
        does = registry.primitive(eqn)
        sizes = [compat.size(var) for var in eqn.outvars]
        if sizes and not any(sizes):  # nothing of a weight
            bases = [base_of(value) for value in values]
            return compat.bind(eqn, [*map(deferred.now, bases)])
        if not weights and does.deferred:
            return [deferred.bind(eqn, others)]
        if not weights and not does.passes:
            return deferred.read(eqn, others, self.product)
        if not does.passes:
            values = [deferred.now(v) if isinstance(v, Deferred) else v for v in values]
        if does.rule is None:
            return self.without_rule(eqn, values, "it has no low-rank rule")
        return does.rule(self, eqn, *values)

    def inner(self, eqn: Eqn, jaxpr: Traced, *args: Value) -> list[Value]:
        """Evaluate a program that stands in an equation of this."""
        return evaluate(self.evaluator, jaxpr, *args, line=self.where(eqn)[1])

    def jitted(self, eqn: Eqn, jaxpr: Traced, *args: Value) -> Values:
        """Do as `inner` does, under `jax.jit` and the name of the equation.

        The constants are inputs of it, so that no compiled program has a copy of them.
        """
        compiled = self.evaluator.compiled
        if (function := compiled.get(jaxpr)) is None:
            program_of, evaluator, line = weakref.ref(jaxpr), self.evaluator, self.where(eqn)[1]

            def inner(consts, *values):
                program = program_of()
                assert program is not None  # whoever calls this has it
                return _evaluate(evaluator, program, consts, *values, line=line)

            inner.__name__ = inner.__qualname__ = eqn.params["name"]
            function = compiled.setdefault(jaxpr, jax.jit(inner))
        return function(compat.consts(jaxpr), *args)

    def where(self, eqn: Eqn) -> tuple[str, str]:
        """Return the operation of an equation, and the user's line that runs it.

        In a function of JAX, whose equations know the line that called it first, that calls it now.
        """
        operation, line = compat.where(eqn)
        lines = (self._line, line) if self.known.is_of_jax else (line, self._line)
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
