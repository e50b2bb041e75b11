"""Parts of a program that come again, as its layers do, and the functions for them.

JAX traces and differentiates a function under `jax.jit` once for all calls of equal shapes. A
program no longer tells which functions it was written with. So a part of it that comes a second
time becomes such a function, which all that do the same call from then on: a layer, an equation
with a program of its own, as of a layer that is rematerialized, or a run of equations that read no
weights, where layers differ elsewhere.
"""

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Var
from jaxlora.tracing.jaxprs.keys import Keys, Part

Function = Callable[..., Any]


def runs(
    eqns: Sequence[Eqn], is_array: Callable[[Atom], bool], alone: Container[Eqn]
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
        if run and not compat.stands_within(eqn, run[0]):
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
    """The functions of what came before, by what is equal of all that comes again.

    Args:
        keys: what the equations of the program do.
        can_share: whether there are any. Where JAX runs each operation at once there are none:
            they would be compiled anew in each run of the program.
    """

    def __init__(self, keys: Keys, can_share: bool):
        self._keys, self.can_share = keys, can_share
        self._functions: dict[Hashable, Function | None] = {}

    def run(self, part: Part, env: Mapping[Atom, Any], scopes: int) -> dict[Atom, jax.Array]:
        """Run a part without weights, as one function with those before that do the same.

        Args:
            part: the equations.
            env: what the variables stand for that they read.
            scopes: the number of their name scopes that this stands in already.

        Returns:
            What its outputs stand for.
        """
        values = [env[var] for var in part.inputs]
        function = _function(part)
        shared = self.shared(part, function)
        with compat.scope(slice(scopes, part.scopes), *part.eqns):
            outs = (shared or function)(*values)
        return dict(zip(part.outputs, outs, strict=True))

    def shared(self, part: Part, function: Function) -> Function | None:
        """Return the function for all parts that do the same, None for the first of them.

        Args:
            part: one of them.
            function: does what it does.
        """
        if not self.can_share:
            return None
        key = self._keys.of(part)
        if key in self._functions:
            return self._functions[key]
        self._functions[key] = jax.jit(function)
        return None

    def tell_apart(self, part: Part) -> None:
        """Have no function for the parts that do the same as one, for they do not."""
        self._functions[self._keys.of(part)] = None


def _function(part: Part) -> Callable[..., list[jax.Array]]:
    """Return a part as a function, which stands in the name scopes of all of it."""

    def repeated(*values):
        env: dict[Atom, Any] = dict(zip(part.inputs, values, strict=True))
        for eqn in part.eqns:
            read = [compat.read(atom, env) for atom in eqn.invars]
            with compat.scope(slice(part.scopes, None), eqn):
                env.update(zip(eqn.outvars, compat.bind(eqn, read), strict=True))
        return [compat.read(atom, env) for atom in part.outputs]

    return repeated
