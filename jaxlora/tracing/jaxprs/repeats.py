"""Equations that come again in a program, as those of its layers do.

JAX traces and differentiates a function under `jax.jit` once for all calls of equal shapes. A
program no longer tells which functions it was written with: its layers are written out, equation by
equation. So equations that stand together and read no weights are taken as one run, and a run that
comes a second time becomes such a function, which all that are the same call from then on. So does
an equation with a program of its own, as a layer that is rematerialized, whatever it reads.

Two runs are the same if their equations are: what they do, what they read, the settings and the
source lines they stand under, and their name scopes within that of the first.
"""

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Literal, Var

Function = Callable[..., Any]


def runs(
    eqns: Sequence[Eqn], is_array: Callable[[Var], bool], alone: Container[Eqn]
) -> Iterator[list[Eqn]]:
    """Cut a program into runs: of one equation, or of several that can be a function.

    Args:
        eqns: the equations of the program.
        is_array: tells whether what a variable stands for is an array; asked when all the runs
            before have been run.
        alone: equations that are runs by themselves.
    """
    run: list[Eqn] = []
    made: set[Atom] = set()

    def joins(eqn):
        if eqn in alone or not _can_be_shared(eqn):
            return False
        if run and compat.scopes_within(run[0], eqn) is None:
            return False
        return all(is_array(a) for a in eqn.invars if isinstance(a, Var) and a not in made)

    for eqn in eqns:
        if run and not joins(eqn):
            yield [*run]
            run.clear()
            made.clear()
        if joins(eqn):
            run.append(eqn)
            made.update(eqn.outvars)
        else:
            yield [eqn]
    if run:
        yield run


def _can_be_shared(eqn: Eqn) -> bool:
    """Tell whether an equation has no effects, and no functions that JAX made for it alone."""
    is_known = eqn.primitive.name in (*compat.JIT, *compat.REMAT)
    return not eqn.effects and (is_known or not compat.inner_jaxprs(eqn))


class Repeats:
    """The runs that there were so far, and the functions for those that come again."""

    def __init__(self):
        self._functions: dict[Hashable, Function] = {}

    def run(
        self, eqns: Sequence[Eqn], env: Mapping[Var, Any], gone: Container[Var]
    ) -> dict[Var, jax.Array]:
        """Run equations as one function if they came before, and else one by one.

        Args:
            eqns: the equations, one run.
            env: what the variables stand for that they read.
            gone: variables that no equation reads after these.

        Returns:
            What the variables stand for that they made, without those that are gone.
        """
        made = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
        read = dict.fromkeys(a for eqn in eqns for a in eqn.invars if isinstance(a, Var))
        inputs = [var for var in read if var not in made]
        outputs = [var for var in made if var not in gone]
        values = [env[var] for var in inputs]
        function = _function(eqns, inputs, outputs)
        key = _key(eqns, [*inputs, *made], outputs, within=eqns[0])
        function = self.shared(function, key, values)
        with compat.scope(eqns[0]):
            return dict(zip(outputs, function(*values), strict=True))

    def shared(self, function: Function, key: Hashable, values: Sequence[object]) -> Function:
        """Return the function for all runs of a key, on these values.

        For the first of them it is the function itself; so it is where nothing is traced.
        """
        if not any(isinstance(value, Tracer) for value in jax.tree.leaves(values)):
            return function
        try:
            shared = self._functions.get(key)
        except TypeError:  # a parameter has no hash
            return function
        if shared is None:
            self._functions[key] = jax.jit(function)
            return function
        return shared


def _function(
    eqns: Sequence[Eqn], inputs: Sequence[Var], outputs: Sequence[Var]
) -> Callable[..., list[jax.Array]]:
    """Return a run as a function, which stands under the name scope of its first equation."""

    def repeated(*values):
        env = dict(zip(inputs, values, strict=True))
        for eqn in eqns:
            read = [compat.read(atom, env) for atom in eqn.invars]
            with compat.scope(eqn, within=eqns[0]):
                env.update(zip(eqn.outvars, compat.bind(eqn, read), strict=True))
        return [env[var] for var in outputs]

    return repeated


def key_of(eqn: Eqn) -> Hashable:
    """Return what is equal of two equations that do the same to what they read."""
    return _key([eqn], [atom for atom in eqn.invars if isinstance(atom, Var)], [], within=eqn)


def _key(
    eqns: Sequence[Eqn], variables: Iterable[Var], outputs: Sequence[Atom], within: Eqn | None
) -> Hashable:
    """Return what is equal of two runs that are the same.

    Args:
        eqns: the equations.
        variables: all that they read and make, in their order.
        outputs: what is returned.
        within: an equation, whose name scope may differ.
    """
    numbers = {var: i for i, var in enumerate(variables)}

    def read(atom):
        if isinstance(atom, Literal):
            return atom.aval, np.asarray(atom.val).tobytes()  # not its value: -0.0 equals 0.0
        return numbers[atom]

    def does(eqn):
        params = [(name, _comparable(value)) for name, value in eqn.params.items()]
        stands = compat.scopes_within(within, eqn), eqn.source_info.traceback, eqn.ctx
        return eqn.primitive, *params, *map(read, eqn.invars), *stands

    return (*map(does, eqns), *map(read, outputs))


def _comparable(value: object) -> Hashable:
    """Return what is equal of two parameters that mean the same; programs are what they do."""
    if isinstance(value, tuple | list):
        return tuple(map(_comparable, value))
    if not compat.is_program(value):
        return value
    program = compat.opened(value)
    made = (var for eqn in program.eqns for var in eqn.outvars)
    variables = (*program.constvars, *program.invars, *made)
    consts = tuple(map(id, compat.consts(value)))
    avals = tuple(var.aval for var in program.invars)
    return _key(program.eqns, variables, program.outvars, within=None), avals, consts
