"""What there is in a traced program."""

from typing import Any

import jax

from jaxlora.tracing.jaxprs import compat


def products(fn, *args):
    """Return for each product in a traced function the shapes of its operands and its result."""

    def shapes(program):
        for eqn in compat.opened(program).eqns:
            if eqn.primitive.name == "dot_general":
                atoms: Any = (*eqn.invars, *eqn.outvars)
                yield tuple(atom.aval.shape for atom in atoms)
            inner_jaxprs = compat.inner_jaxprs(eqn)
            if eqn.params.get("branches_platforms"):  # each platform compiles one of them
                inner_jaxprs = inner_jaxprs[:1]
            for inner in inner_jaxprs:
                yield from shapes(inner)

    return list(shapes(jax.make_jaxpr(fn)(*args)))
