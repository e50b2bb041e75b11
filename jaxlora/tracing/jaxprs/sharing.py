"""Which products of a program read one input, and so can share work.

The queries, keys and values of an attention are products of one input, and so are the gate and
the up projection of a gated layer: ``x [a_q a_k a_v]`` is one product in the place of three, and
x is read once, and once more for the gradients. They are found in the program, where the
products name the same variable, and not by what the weights are called.
"""

import dataclasses
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Jaxpr, Var


@dataclasses.dataclass(frozen=True)
class Reader:
    """A product that reads an input.

    Attributes:
        eqn: its equation.
        operand: the position of the input among its operands.
    """

    eqn: Eqn
    operand: int

    @property
    def other(self) -> Atom:
        """The other operand, which has the weight if one of the two has."""
        return self.eqn.invars[1 - self.operand]


@dataclasses.dataclass(frozen=True)
class Plan:
    """An order of a program's equations in which products of one input can be taken together.

    Attributes:
        eqns: the equations; the light ones that shape the weight of a product stand before the
            first product of the same input.
        groups: by product, all that contract the same dimensions of the same variable.
    """

    eqns: Sequence[Eqn]
    groups: dict[Reader, list[Reader]]

    def readers_after(self, reader: Reader) -> list[Reader]:
        """Return the products of the same input that run after one."""
        group = self.groups.get(reader, [reader])
        return group[group.index(reader) + 1 :]


def plan(program: Jaxpr) -> Plan:
    """Find the products of one input in a program."""
    found: dict[Hashable, list[Reader]] = {}
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            sides = zip(eqn.invars, *eqn.params["dimension_numbers"], strict=True)
            for operand, (var, summed, batch) in enumerate(sides):
                if isinstance(var, Var):
                    reader = Reader(eqn, operand)
                    found.setdefault((var, tuple(summed), tuple(batch)), []).append(reader)
    groups = [group for group in found.values() if len(group) > 1]
    if not groups:
        return Plan(program.eqns, {})
    by_reader = {reader: group for group in groups for reader in group}
    return Plan(_hoisted(program, groups), by_reader)


def _hoisted(program: Jaxpr, groups: Iterable[list[Reader]]) -> list[Eqn]:
    """Return the equations, with what the members of a group need before its first."""
    needed: dict[Eqn, list[Atom]] = {}
    for group in groups:
        needed.setdefault(group[0].eqn, []).extend(reader.other for reader in group)
    makers = {var: (i, eqn) for i, eqn in enumerate(program.eqns) for var in eqn.outvars}
    order: dict[Eqn, None] = {}  # a set that keeps the order
    for eqn in program.eqns:
        for var in needed.get(eqn, ()):
            order.update(dict.fromkeys(_makers(var, makers, order)))
        order.setdefault(eqn)
    return list(order)


def _makers(atom: Atom, makers: Mapping[Var, tuple[int, Eqn]], done: Container[Eqn]) -> list[Eqn]:
    """Return the equations that are left to run for a variable, none if one of them is heavy."""
    found: dict[int, Eqn] = {}
    left = [atom]
    while left:
        atom = left.pop()
        if not isinstance(atom, Var) or atom not in makers:
            continue
        i, eqn = makers[atom]
        if eqn in done or i in found:
            continue
        if registry.primitive(eqn).is_heavy or eqn.effects or compat.inner_jaxprs(eqn):
            return []
        found[i] = eqn
        left += eqn.invars
    return [found[i] for i in sorted(found)]
