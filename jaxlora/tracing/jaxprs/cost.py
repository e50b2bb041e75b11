"""What the low-rank terms of a program cost beyond the program itself.

In an evaluation that is recorded, all that a rule adds stands under a scope with the number of its
weight. So the cost is counted on the program that runs, whatever form a rule has chosen.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from jaxlora.tracing.jaxprs import compat

_SCOPE = "lora@"
_ELEMENTWISE = ("add", "sub", "mul", "div", "add_any")


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


def count(jaxpr: Any) -> dict[int, Cost]:
    """Return the cost of what stands under the scope of each number."""
    costs: dict[int, Cost] = {}
    for number, cost in _costs(compat.opened(jaxpr), None):
        costs[number] = costs.get(number, Cost()) + cost
    return costs


def _costs(program: Any, outer: int | None) -> Iterator[tuple[int, Cost]]:
    for eqn in program.eqns:
        found = re.findall(rf"{_SCOPE}(\d+)", str(eqn.source_info.name_stack))
        number = int(found[-1]) if found else outer
        inner = compat.inner_jaxprs(eqn)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for jaxpr in inner:
            for at, cost in _costs(compat.opened(jaxpr), number):
                yield at, cost * times
        if number is not None and not inner and (flops := _flops(eqn)):
            yield number, Cost(flops, _bytes(eqn))


def _flops(eqn: Any) -> int:
    name, out = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape)
    if name in _ELEMENTWISE:
        return out
    if name == "reduce_sum":
        return math.prod(eqn.invars[0].aval.shape)
    if name == "dot_general":
        (summed, _), _ = eqn.params["dimension_numbers"]
    elif name == "ragged_dot_general":
        (summed, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    elif name == "conv_general_dilated":
        kernel, channels = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
        return 2 * out * math.prod(kernel) // kernel[channels]
    else:
        return 0
    return 2 * out * math.prod(eqn.invars[0].aval.shape[d] for d in summed)


def _bytes(eqn: Any) -> int:
    atoms = {id(atom): atom.aval for atom in (*eqn.invars, *eqn.outvars)}
    arrays = [aval for aval in atoms.values() if hasattr(aval, "dtype")]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays)
