"""The table of primitives: what the transform knows of each, declared where its rule is written.

A rule is a function ``rule(run, eqn, *values) -> outputs``. The decorator declares it for the
primitives of some names, and beside it what else has to be known of them::

    @rule("neg", deferred=later, flops=elementwise)
    def negate(run, eqn, weight): ...

So a new operation is one function in one file of `jaxlora.tracing.rules`. The table is filled as
those files are imported, and not changed afterwards.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from jaxlora.tracing.jaxprs.compat import Eqn

Rule = Callable[..., list[Any]]
F = TypeVar("F", bound=Rule)


@dataclasses.dataclass(frozen=True)
class Primitive:
    """What is known of a primitive; of one that no rule declares, nothing.

    Attributes:
        rule: evaluates an equation of it that has a low-rank weight among its inputs.
        passes: its rule takes and returns deferred arrays, see `jaxlora.tracing.values.deferred`;
            for any other they are made first.
        deferred: does it to a deferred array, ``deferred(eqn, x, *operands)``, so that the result
            is deferred as well; what returns None is done when the array is made. Where there is
            no such function the array is made, and the primitive reads it.
        is_product: its first two inputs are multiplied, and the result is linear in each.
        is_heavy: it is not run earlier than the program does, so that products can share their
            input; no product is.
        flops: counts the operations of an equation, a multiplication and an addition as two.
        times: counts how often an equation runs the program that stands in it.
    """

    rule: Rule | None = None
    passes: bool = False
    deferred: Callable[..., Any] | None = None
    is_product: bool = False
    is_heavy: bool = False
    flops: Callable[[Eqn], int] = lambda eqn: 0
    times: Callable[[Eqn], int] = lambda eqn: 1


_TABLE: dict[str, Primitive] = {}
_UNKNOWN = Primitive()


def rule(
    *names: str,
    passes: bool = False,
    deferred: Callable[..., Any] | None = None,
    is_product: bool = False,
    is_heavy: bool = False,
    flops: Callable[[Eqn], int] = _UNKNOWN.flops,
    times: Callable[[Eqn], int] = _UNKNOWN.times,
) -> Callable[[F], F]:
    """Declare a function as the rule of the primitives of these names, see `Primitive`.

    Raises:
        ValueError: a primitive has a rule already.
    """

    def declare(function: F) -> F:
        if known := _TABLE.keys() & {*names}:
            raise ValueError(f"the primitives {sorted(known)} have a rule already")
        heavy = is_product or is_heavy
        primitive = Primitive(function, passes, deferred, is_product, heavy, flops, times)
        _TABLE.update(dict.fromkeys(names, primitive))
        return function

    return declare


def primitive(eqn: Eqn) -> Primitive:
    """Return what is known of the primitive of an equation."""
    return _TABLE.get(eqn.primitive.name, _UNKNOWN)
