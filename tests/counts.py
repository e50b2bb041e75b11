"""What there is in a traced program."""

import jax

from jaxlora.tracing.jaxprs import compat


def products(fn, *args):
    """Return for each product in a traced function the shapes of its operands and its result."""

    def shapes(program):
        for eqn in compat.opened(program).eqns:
            if eqn.primitive.name == "dot_general":
                yield tuple(var.aval.shape for var in (*eqn.invars, *eqn.outvars))
            for inner in compat.inner_jaxprs(eqn):
                yield from shapes(inner)

    return list(shapes(jax.make_jaxpr(fn)(*args)))
