"""Evaluate a program with low-rank weights among its values.

The program is a jaxpr. An equation without a low-rank weight among its inputs runs as it is. One
with goes to the rule of its primitive; a rule is a function registered here by primitive name,
``rule(walk, eqn, *values) -> list of outputs``. Where there is no rule, or the rule does not
cover the case, the weight is made dense: correct, and never silent.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlora.tracing import compat, cost, deferred, frames, grouping
from jaxlora.tracing.deferred import Deferred
from jaxlora.tracing.frames import Frame
from jaxlora.tracing.lowrank import LowRank
from jaxlora.weight import merge_dtype

Rule = Callable[..., list[Any]]
_RULES: dict[str, Rule] = {}
_PASSING: set[str] = set()  # the primitives whose rules pass on what is deferred

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
CHECKPOINT_NAME = "lora"
Form = Literal["auto", "factored", "weight-side"]
CONTRACTED, LOOKED_UP, MATERIALIZED = "contracted", "looked up", "materialized"


class MaterializationWarning(UserWarning):
    """An adapted weight was made dense, because an operation has no low-rank rule."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a weight.

    Attributes:
        path: path of the weight.
        operation: name of the primitive.
        source: line of the user's program, ``file:line``.
        kind: "contracted", "looked up" or "materialized".
        stack: axes of the weight that are a stack here.
        in_: axes contracted or looked up along.
        out: axes left in the result.
        reason: why the weight was materialized.
        form: the form of a product where it is differentiated, see `jaxlora.lora`.
        sharing: the number of products of one input that share the product with their first
            factors, this among them.
    """

    path: str
    operation: str
    source: str
    kind: str
    stack: frozenset = frozenset()
    in_: frozenset = frozenset()
    out: frozenset = frozenset()
    reason: str = ""
    form: str = ""
    sharing: int = 1


def rule(*primitives: str, passes: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of the primitives of these names; it may pass on what is deferred."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, function))
        _PASSING.update(primitives if passes else ())
        return function

    return register


class Walk:
    """One way to evaluate programs: what to do where there is no rule, and what to write down.

    Attributes:
        strict: raise where a weight would be materialized.
        form: form of the products, see `jaxlora.tracing.forms`.
        is_linear: the program is a derivative, to be transposed, and so nothing in it is named.
        observes: products tell of their inputs and have no low-rank term, see `transform.observe`.
        uses: the uses met so far, or None where they are not wanted.
        frame: the program being run.
        numbers: with uses, the number by which `cost.scope` knows the paths of a weight.
    """

    def __init__(
        self,
        *,
        strict: bool = False,
        form: Form = "auto",
        record: bool = False,
        is_linear: bool = False,
        observes: bool = False,
    ):
        self.strict, self.is_linear, self.observes = strict, is_linear, observes
        self.form: Form = form
        self.uses: dict[Any, Use] | None = {} if record else None
        self.numbers: dict[tuple[str, ...], int] = {}
        self.warned: dict[Any, Any] = {}  # the registry of `warnings`: each line is told of once
        self.frame = Frame({}, {}, {})
        self.compiled = functools.lru_cache(maxsize=256)(self._compiled)

    def run(self, jaxpr: Any, *args: Any) -> list[Any]:
        """Evaluate a jaxpr on arrays and low-rank weights."""
        program = compat.opened(jaxpr)
        env = dict(zip(program.constvars, compat.consts(jaxpr), strict=True))
        env.update(zip(program.invars, args, strict=True))
        plan = grouping.plan(program)
        last = frames.last_uses(plan.eqns, program.outvars)
        outer, self.frame = self.frame, Frame(env, plan.readers, frames.values(program))

        def read(atom):
            return atom.val if isinstance(atom, compat.Literal) else env[atom]

        for i, eqn in enumerate(plan.eqns):
            values = [read(atom) for atom in eqn.invars]
            with compat.scope(eqn):
                env.update(zip(eqn.outvars, self._step(eqn, values), strict=True))
            for var in last.get(i, ()):
                env.pop(var, None)
        self.frame = outer
        return [read(atom) for atom in program.outvars]

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

    def derivative(self) -> "Walk":
        """Return a walk as this, for programs that have to stay linear."""
        walk = Walk(strict=self.strict, form=self.form, is_linear=True)
        walk.uses, walk.numbers, walk.warned = self.uses, self.numbers, self.warned
        return walk

    def named(self, h: jax.Array) -> jax.Array:
        """Name a rank-sized product, so that a policy of `jax.checkpoint` can keep it."""
        return h if self.is_linear else checkpoint_name(h, CHECKPOINT_NAME)

    def finish(self, out: Any) -> Any:
        """Return what leaves the program at its end: rows that were looked up as an array."""
        if isinstance(out, LowRank) and out.is_rows():
            return self.densify(None, out, "")
        return out

    def without_rule(self, eqn: Any, values: Sequence[Any], reason: str) -> list[Any]:
        """Run an equation with every low-rank weight among its inputs made dense."""
        return compat.bind(eqn, [self.densify(eqn, value, reason) for value in values])

    def densify(self, eqn: Any, value: Any, reason: str) -> Any:
        """Return an array for a value; say so if that is a weight and not rows of it."""
        if not isinstance(value, LowRank):
            return deferred.now(value)
        if value.is_rows():
            self.record(eqn, value, LOOKED_UP)
        else:
            self.record(eqn, value, MATERIALIZED, reason, stack=frozenset())
            self._complain(eqn, value, reason)
        if value.is_probe:
            return value.base
        dtype = value.base.dtype if value.is_rows() else merge_dtype(value.base.dtype)
        with self.scope(value):
            return value.dense(dtype)

    def product(self, function: Callable[..., Any], x: Any, w: Any, *others: Any) -> Any:
        """Return a function, linear in x, of it and a weight, which is made for it if deferred."""
        if not isinstance(w, Deferred):
            return function(x, w, *others)
        self.frame.last = deferred.product(function, x, w, *others, after=self.frame.last)
        return self.frame.last

    def made(self, eqn: Any, value: Any) -> Any:
        """Return a value that is not deferred; say so, for it will be kept as it is made here."""
        if isinstance(value, LowRank) and isinstance(value.base, Deferred):
            self._complain(eqn, value, "it is dequantized for a function with its own derivative")
            return value.replace(base=deferred.now(value.base))
        return value

    def scope(self, *weights: LowRank) -> Any:
        """Return the name scope of what is added to the program for some weights."""
        if self.uses is None:
            return jax.named_scope(CHECKPOINT_NAME)
        paths = tuple(path for weight in weights for path in weight.origin.paths)
        number = self.numbers.setdefault(paths, len(self.numbers))
        return jax.named_scope(cost.scope(number))

    def record(
        self,
        eqn: Any,
        weight: LowRank,
        kind: str,
        reason: str = "",
        form: str = "",
        sharing: int = 1,
        **axes_of: Any,
    ) -> None:
        """Write down a use of a weight; a lookup tells its axes from what was picked."""
        if self.uses is None:
            return
        where = compat.where(eqn)
        if kind == LOOKED_UP:
            where, every = weight.picked_at, weight.labels(*range(len(weight.dims)))
            out = every - weight.picked - weight.scanned
            axes_of = {"in_": weight.picked, "out": out, "stack": frozenset()}
        if "stack" in axes_of:
            axes_of["stack"] |= weight.scanned
        for path in weight.origin.paths:
            found = {name: _axes_of(path, labels) for name, labels in axes_of.items()}
            use = Use(path, *where, kind, reason=reason, form=form, sharing=sharing, **found)
            self.uses.setdefault((id(eqn), use), use)

    def _complain(self, eqn: Any, weight: LowRank, reason: str) -> None:
        if weight.is_probe or self.uses is not None:
            return
        operation, source = compat.where(eqn)
        path = " + ".join(weight.origin.paths)
        what = f"the weight {path!r} reaches {operation!r} at {source}, and {reason}"
        if self.strict:
            raise ValueError(f"{what}: strict=True needs a low-rank rule at every use")
        message = f"{what}: it is materialized there"
        warnings.warn_explicit(
            message, MaterializationWarning, *compat.line(eqn), registry=self.warned
        )

    def _compiled(self, jaxpr: Any, name: str) -> Callable[..., Any]:
        def evaluate(*values):
            return self.run(jaxpr, *values)

        evaluate.__name__ = evaluate.__qualname__ = name
        return jax.jit(evaluate)


def _axes_of(path: str, labels: Any) -> frozenset:
    """Return the axes of one weight among the labels of a probe; roles as they are."""
    return frozenset(
        label[1] if isinstance(label, tuple) else label
        for label in labels
        if not isinstance(label, tuple) or label[0] == path
    )
