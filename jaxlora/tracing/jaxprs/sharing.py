"""Which products of a program read one input, and so can share work.

The queries, keys and values of an attention are products of one input, and so are the gate and
the up projection of a gated layer: ``x [a_q a_k a_v]`` is one product in the place of three, and
x is read once, and once more for the gradients. They are found in the program, where the
products name the same variable, and not by what the weights are called.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jaxlora.tracing.jaxprs import compat

_HEAVY = ("dot_general", "ragged_dot_general", "conv_general_dilated", "gather")


@dataclasses.dataclass(frozen=True)
class Plan:
    """An order of a program's equations in which products of one input can be taken together.

    Attributes:
        eqns: the equations; the light ones that shape the weight of a product stand before the
            first product of the same input.
        readers: the products that contract the same dimensions of the same variable, by each of
            them, by id, and the position of the variable among its operands.
    """

    eqns: Sequence[Any]
    readers: dict[tuple[int, int], list[tuple[Any, int]]]


def plan(program: Any) -> Plan:
    """Find the products of one input in a program."""
    groups: dict[Any, list[tuple[Any, int]]] = {}
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            sides = zip(eqn.invars, *eqn.params["dimension_numbers"], strict=True)
            for side, (var, summed, batch) in enumerate(sides):
                if not isinstance(var, compat.Literal):
                    groups.setdefault((var, tuple(summed), tuple(batch)), []).append((eqn, side))
    several = [group for group in groups.values() if len(group) > 1]
    if not several:
        return Plan(program.eqns, {})
    readers = {(id(eqn), side): group for group in several for eqn, side in group}
    return Plan(_hoisted(program, several), readers)


def _hoisted(program: Any, groups: Iterable[list[tuple[Any, int]]]) -> list[Any]:
    """Return the equations, with what the members of a group need before its first."""
    needed: dict[int, list[Any]] = {}
    for group in groups:
        needed.setdefault(id(group[0][0]), []).extend(eqn.invars[1 - side] for eqn, side in group)
    makers = {var: (i, eqn) for i, eqn in enumerate(program.eqns) for var in eqn.outvars}
    order: dict[int, Any] = {}
    for eqn in program.eqns:
        for var in needed.get(id(eqn), ()):
            order.update((id(maker), maker) for maker in _makers(var, makers, order))
        order.setdefault(id(eqn), eqn)
    return list(order.values())


def _makers(var: Any, makers: dict[Any, tuple[int, Any]], done: dict[int, Any]) -> list[Any]:
    """Return the equations that are left to run for a variable, none if one of them is heavy."""
    found: dict[int, Any] = {}
    left = [var]
    while left:
        atom = left.pop()
        if isinstance(atom, compat.Literal) or atom not in makers:
            continue
        i, eqn = makers[atom]
        if id(eqn) in done or i in found:
            continue
        if eqn.primitive.name in _HEAVY or eqn.effects or compat.inner_jaxprs(eqn):
            return []
        found[i] = eqn
        left += eqn.invars
    return [found[i] for i in sorted(found)]
