"""What the low-rank terms of a program cost beyond the program itself.

In an evaluation that is recorded, all that a rule adds stands under a scope with the number of its
weight. So the cost is counted on the program that runs, whatever form a rule has chosen.
"""

import dataclasses
import re
from collections.abc import Iterator

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Eqn, Jaxpr, Traced

_SCOPE = "lora@"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Extra work of one call of the program; loops of unknown length count once.

    Attributes:
        flops: operations, a multiplication and an addition counting as two.
        bytes: bytes that the operations read and write, each as if it ran by itself; what only
            moves elements is not counted.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def shared(self, among: int) -> "Cost":
        """Return the part of each of several weights."""
        return Cost(self.flops // among, self.bytes // among)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


def scope(number: int) -> str:
    """Return the name of the scope of what is added for the weight of a number."""
    return f"{_SCOPE}{number}"


def count(jaxpr: Traced) -> dict[int, Cost]:
    """Return the cost of what stands under the scope of each number."""
    costs: dict[int, Cost] = {}
    for number, cost in _costs(compat.opened(jaxpr), None):
        costs[number] = costs.get(number, Cost()) + cost
    return costs


def _costs(program: Jaxpr, outer: int | None) -> Iterator[tuple[int, Cost]]:
    for eqn in program.eqns:
        found = re.findall(rf"{_SCOPE}(\d+)", str(eqn.source_info.name_stack))
        number = int(found[-1]) if found else outer
        inner = compat.inner_jaxprs(eqn)
        known = registry.primitive(eqn)
        for jaxpr in inner:
            for at, cost in _costs(compat.opened(jaxpr), number):
                yield at, cost * known.times(eqn)
        if number is not None and not inner and (flops := known.flops(eqn)):
            yield number, Cost(flops, _bytes(eqn))


def _bytes(eqn: Eqn) -> int:
    atoms = {id(atom): atom for atom in (*eqn.invars, *eqn.outvars)}
    return sum(compat.nbytes(atom) for atom in atoms.values())
