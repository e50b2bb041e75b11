"""What is equal of equations that do the same, wherever they stand in a program.

Two do the same if their primitives, parameters, literals to the bit, settings and source lines are
equal. Programs among their parameters are compared by what they do.
"""

import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Self, TypeVar

import numpy as np

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Jaxpr, Literal, Traced, Var

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Equations of a program that stand together.

    Attributes:
        eqns: the equations.
        inputs: the variables that they read and do not make.
        outputs: what is read of them after them.
        scopes: the number of name scopes that all of them stand in, outermost first.
    """

    eqns: Sequence[Eqn]
    inputs: Sequence[Var]
    outputs: Sequence[Atom]
    scopes: int

    @classmethod
    def whole(cls, program: Jaxpr, eqns: Sequence[Eqn]) -> Self:
        """Return all of a program, its equations in this order, with all their name scopes."""
        return cls(eqns, (*program.constvars, *program.invars), program.outvars, scopes=0)

    @classmethod
    def of(cls, eqns: Sequence[Eqn], gone: Collection[Var]) -> Self:
        """Return equations as a part.

        Args:
            eqns: the equations.
            gone: variables that nothing reads after them.
        """
        made = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
        read = dict.fromkeys(a for eqn in eqns for a in eqn.invars if isinstance(a, Var))
        inputs = [var for var in read if var not in made]
        outputs = [var for var in made if var not in gone]
        return cls(eqns, inputs, outputs, len(compat.common_scopes(eqns)))


class Keys:
    """Numbers for what the equations of a program do; those that do the same have the same.

    Args:
        values: what the variables stand for, see `dataflow.values`.
        varying: along which dimensions predicates vary, see `dataflow.varying`.
    """

    def __init__(self, values: Mapping[Atom, Atom], varying: Mapping[Atom, Sequence[int]]):
        self._values, self._varying = values, varying
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[Eqn | Part | Traced, int] = {}  # of what was asked for

    def does(self, eqn: Eqn) -> int:
        """Return the number of what an equation does, whichever variables it reads."""
        return self._number(eqn, self._does)

    def of(self, part: Part) -> int:
        """Return the number of what a part does; the scopes that all of it is in may differ."""
        return self._number(part, self._part_does)

    def _number(self, of: T, what: Callable[[T], Hashable]) -> int:
        if (number := self._known.get(of)) is None:
            try:
                number = self._numbers.setdefault(what(of), len(self._numbers))
            except TypeError:  # a parameter has no hash, so this is like nothing else
                number = self._numbers.setdefault(object(), len(self._numbers))
            self._known[of] = number
        return number

    def _does(self, eqn: Eqn) -> Hashable:
        """Return all that an equation is, without its variables and its name scopes."""
        params = [(name, self._comparable(value)) for name, value in eqn.params.items()]
        literals = [_literal(atom) for atom in eqn.invars if isinstance(atom, Literal)]
        return eqn.primitive, *params, *literals, eqn.source_info.traceback, eqn.ctx

    def _comparable(self, value: object) -> Hashable:
        """Return what is equal of two parameters that mean the same."""
        if isinstance(value, tuple | list):
            return tuple(map(self._comparable, value))
        return self._number(value, self._program_does) if compat.is_program(value) else value

    def _program_does(self, jaxpr: Traced) -> Hashable:
        whole = Part.whole(compat.opened(jaxpr), compat.opened(jaxpr).eqns)
        return "program", *self._structure(whole), *map(id, compat.consts(jaxpr))

    def _part_does(self, part: Part) -> Hashable:
        return "part", *self._structure(part), *self._facts(part)

    def _structure(self, part: Part) -> tuple[Hashable, ...]:
        """Return what each equation does, and how variables go from one to another."""
        does = [(self.does(eqn), compat.scopes(eqn)[part.scopes :]) for eqn in part.eqns]
        return *does, *_flow(part)

    def _facts(self, part: Part) -> Iterable[Hashable]:
        """Return what is known of variables that what a part is made of does not tell."""
        if not self._values and not self._varying:
            return ()
        variables = (*part.inputs, *(var for eqn in part.eqns for var in eqn.outvars))
        first: dict[Atom, int] = {}
        stand_for = (self._values.get(var, var) for var in variables)
        alike = [first.setdefault(atom, len(first)) for atom in stand_for]
        return *alike, *(self._varying.get(var) for var in part.inputs)


def _flow(part: Part) -> tuple[Hashable, ...]:
    """Return the types of inputs, and which variables are read and returned, by number."""
    made = (var for eqn in part.eqns for var in eqn.outvars)
    numbers = {var: i for i, var in enumerate((*part.inputs, *made))}
    read = (*(atom for eqn in part.eqns for atom in eqn.invars), *part.outputs)
    flow = (_literal(a) if isinstance(a, Literal) else numbers[a] for a in read)
    return *(var.aval for var in part.inputs), *flow


def _literal(atom: Literal) -> Hashable:
    return atom.aval, np.asarray(atom.val).tobytes()  # not its value: -0.0 equals 0.0
