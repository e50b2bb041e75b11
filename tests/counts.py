"""What there is in a traced program."""

import re
from collections.abc import Iterator
from typing import Any

import jax

from jaxlora.tracing.jaxprs import compat


def equations(program: Any, name: str) -> Iterator[compat.Eqn]:
    """Yield the equations of an operation in a program and those inside of it."""
    for eqn in compat.opened(program).eqns:
        if eqn.primitive.name == name:
            yield eqn
        inner_jaxprs = compat.inner_jaxprs(eqn)
        if eqn.params.get("branches_platforms"):  # each platform compiles one of them
            inner_jaxprs = inner_jaxprs[:1]
        for inner in inner_jaxprs:
            yield from equations(inner, name)


def repeated(program: Any) -> list[Any]:
    """Return the functions that layers share in a program, one for each call."""
    calls = [eqn for name in compat.JIT for eqn in equations(program, name)]
    return [eqn.params["jaxpr"] for eqn in calls if eqn.params["name"] == "repeated"]


def products(fn, *args):
    """Return for each product in a traced function the shapes of its operands and its result."""
    program = jax.make_jaxpr(fn)(*args)
    return [
        tuple(compat.shape(atom) for atom in (*eqn.invars, *eqn.outvars))
        for eqn in equations(program, "dot_general")
    ]


def op_names(fn, *args) -> set[str]:
    """Return the names of the operations in a compiled function, within the name scopes of it."""
    text = jax.jit(fn).lower(*args).compile().as_text() or ""
    return {*re.findall(r'op_name="jit\([^)]*\)/([^"]*)"', text)}
