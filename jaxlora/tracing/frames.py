"""What is known of a program while it is run: values of its variables, and what they stand for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlora.tracing import compat


@dataclasses.dataclass
class Frame:
    """What is known of the program that is being run.

    Attributes:
        env: values of the variables.
        readers: the products that read one input, see `grouping.Plan`.
        values: what the variables stand for, see `values`.
        last: the last product with a weight that was made for it, see `deferred.product`.
        narrowed: by id of an equation, the product of its input and the first factor, and how
            many equations share that, where it was made for several.
    """

    env: dict[Any, Any]
    readers: dict[tuple[int, int], list[tuple[Any, int]]]
    values: dict[Any, tuple[Any, bool]]
    last: Any = None
    narrowed: dict[int, tuple[Any, int]] = dataclasses.field(default_factory=dict)


def values(program: Any) -> dict[Any, tuple[Any, bool]]:
    """Return what the variables of a program stand for, for those that select between them.

    Returns:
        By variable: the first that is computed in the same way, whatever stops a gradient or
        selects between one and the same, and whether a gradient is stopped on the way.
    """
    if all(eqn.primitive.name != "select_n" for eqn in program.eqns):
        return {}
    found: dict[Any, tuple[Any, bool]] = {}
    first: dict[Any, Any] = {}
    for eqn in program.eqns:
        has_literal = any(isinstance(atom, compat.Literal) for atom in eqn.invars)
        if has_literal or eqn.effects or compat.inner_jaxprs(eqn):
            continue
        name = eqn.primitive.name
        inputs = [found.get(atom, (atom, False)) for atom in eqn.invars]
        cases = {value for value, _ in inputs[name == "select_n" :]}
        if name == "stop_gradient" or (name == "select_n" and len(cases) == 1):
            is_stopped = name == "stop_gradient" or all(stopped for _, stopped in inputs[1:])
            found[eqn.outvars[0]] = (*cases, is_stopped)
            continue
        for i, var in enumerate(eqn.outvars):
            way = (i, name, str(eqn.params), *(value for value, _ in inputs))
            found[var] = (first.setdefault(way, var), any(stopped for _, stopped in inputs))
    return found


def last_uses(eqns: Sequence[Any], outvars: Sequence[Any]) -> dict[int, list[Any]]:
    """Return the variables that no later equation reads, by index of equation."""
    kept = {atom for atom in outvars if not isinstance(atom, compat.Literal)}
    last = {}
    for i, eqn in enumerate(eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, compat.Literal) and atom not in kept:
                last[atom] = i
    by_index: dict[int, list[Any]] = {}
    for var, i in last.items():
        by_index.setdefault(i, []).append(var)
    return by_index
