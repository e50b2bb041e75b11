"""What is equal of equations that do the same, wherever they stand in a program.

Two do the same if their primitives, parameters, literals to the bit, settings and source lines are
equal. Programs among their parameters are compared by what they do.
"""

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Literal, Var


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Equations of a program that stand together.

    Attributes:
        eqns: the equations.
        inputs: the variables that they read and do not make.
        outputs: those that they make and that are read after them.
        scopes: the number of name scopes that all of them stand in, outermost first.
    """

    eqns: Sequence[Eqn]
    inputs: Sequence[Var]
    outputs: Sequence[Atom]
    scopes: int

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
        self._known: dict[Eqn, int] = {}

    def does(self, eqn: Eqn) -> int:
        """Return the number of what an equation does, whichever variables it reads."""
        if eqn not in self._known:
            try:
                number = self._numbers.setdefault(_does(eqn), len(self._numbers))
            except TypeError:  # a parameter has no hash, so the equation is like no other
                number = self._numbers.setdefault(object(), len(self._numbers))
            self._known[eqn] = number
        return self._known[eqn]

    def of(self, part: Part) -> Hashable:
        """Return what is equal of parts that do the same; the scopes of all of it may differ."""
        does = [(self.does(eqn), compat.scopes(eqn)[part.scopes :]) for eqn in part.eqns]
        return *does, *_flow(part.eqns, part.inputs, part.outputs), *self._facts(part)

    def _facts(self, part: Part) -> Iterable[Hashable]:
        """Return what is known of the variables of a part from the equations before it."""
        if not self._values and not self._varying:
            return ()
        variables = (*part.inputs, *(var for eqn in part.eqns for var in eqn.outvars))
        first: dict[Atom, int] = {}
        stand_for = (self._values.get(var, var) for var in variables)
        alike = [first.setdefault(atom, len(first)) for atom in stand_for]
        return *alike, *(self._varying.get(var) for var in part.inputs)


def _does(eqn: Eqn) -> Hashable:
    """Return all that an equation is, without its variables and its name scopes."""
    params = [(name, _comparable(value)) for name, value in eqn.params.items()]
    literals = [_literal(atom) for atom in eqn.invars if isinstance(atom, Literal)]
    return eqn.primitive, *params, *literals, eqn.source_info.traceback, eqn.ctx


def _comparable(value: object) -> Hashable:
    """Return what is equal of two parameters that mean the same; programs are what they do."""
    if isinstance(value, tuple | list):
        return tuple(map(_comparable, value))
    if not compat.is_program(value):
        return value
    program = compat.opened(value)
    inputs = (*program.constvars, *program.invars)
    does = [(_does(eqn), compat.scopes(eqn)) for eqn in program.eqns]
    consts, avals = map(id, compat.consts(value)), (var.aval for var in inputs)
    return *does, *_flow(program.eqns, inputs, program.outvars), *consts, *avals


def _flow(
    eqns: Sequence[Eqn], inputs: Iterable[Var], outputs: Sequence[Atom]
) -> tuple[Hashable, ...]:
    """Return which variables equations read and return, by number, and which literals."""
    made = (var for eqn in eqns for var in eqn.outvars)
    numbers = {var: i for i, var in enumerate((*inputs, *made))}
    read = (*(atom for eqn in eqns for atom in eqn.invars), *outputs)
    return tuple(_literal(a) if isinstance(a, Literal) else numbers[a] for a in read)


def _literal(atom: Literal) -> Hashable:
    return atom.aval, np.asarray(atom.val).tobytes()  # not its value: -0.0 equals 0.0
