"""What is recorded while a program is evaluated: each operation that consumes a weight."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import TypedDict, Unpack

from jaxlora.tracing.jaxprs.compat import Eqn
from jaxlora.tracing.values.weight import Weight


class Kind(enum.StrEnum):
    """What becomes of a weight at an operation that consumes it."""

    CONTRACTED = "contracted"
    LOOKED_UP = "looked up"
    MATERIALIZED = "materialized"


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a weight.

    Attributes:
        path: path of the weight.
        operation: name of the primitive.
        source: line of the user's program, ``file:line``.
        kind: what becomes of it: "contracted", "looked up" or "materialized".
        stack: axes of the weight that are a stack here.
        in_: axes contracted or looked up along.
        out: axes left in the result.
        window: those of the contracted axes that are the window of a convolution, in the order
            in which its input has them; none of one that is the transpose of a convolution.
        reason: why the weight was materialized.
        form: the form of a product where it is differentiated, see `jaxlora.lora`.
        why: why it has that form.
        sharing: the number of products of one input that share the product with their first
            factors, this among them.
    """

    path: str
    operation: str
    source: str
    kind: Kind
    stack: frozenset = frozenset()
    in_: frozenset = frozenset()
    out: frozenset = frozenset()
    window: tuple[object, ...] = ()
    reason: str = ""
    form: str = ""
    why: str = ""
    sharing: int = 1


class Facts(TypedDict, total=False):
    """What else than its kind is recorded of a use, see `Use`; the axes are labels."""

    stack: frozenset
    in_: frozenset
    out: frozenset
    window: Sequence[frozenset]
    reason: str
    form: str
    why: str
    sharing: int


class Recorder:
    """The uses met so far, and the number by which `cost.scope` knows the paths of a weight."""

    def __init__(self):
        self._uses: dict[tuple[Eqn | None, Use], Use] = {}
        self.numbers: dict[tuple[str, ...], int] = {}

    @property
    def uses(self) -> list[Use]:
        """The uses in the order they were met; a loop's body that is run again counts once."""
        return [*self._uses.values()]

    def number(self, paths: tuple[str, ...]) -> int:
        """Return the number of the weight of these paths."""
        return self.numbers.setdefault(paths, len(self.numbers))

    def record_lookup(self, eqn: Eqn | None, rows: Weight) -> None:
        """Record what was looked up, at the operation that picked it.

        Args:
            eqn: the equation that reads the rows, None for the end of the program.
            rows: what was picked of a weight.
        """
        out = rows.labels(*range(len(rows.dims))) - rows.picked - rows.known_stack()
        self.record(eqn, rows.picked_at, rows, Kind.LOOKED_UP, in_=rows.picked, out=out)

    def record(
        self,
        eqn: Eqn | None,
        where: tuple[str, str],
        weight: Weight,
        kind: Kind,
        **facts: Unpack[Facts],
    ) -> None:
        """Record a use of a weight.

        Args:
            eqn: the equation that uses it, None for the end of the program.
            where: operation and line of the user's program.
            weight: the weight.
            kind: what becomes of it.
            **facts: what else is known.
        """
        in_, out = facts.get("in_", frozenset()), facts.get("out", frozenset())
        stack = facts.get("stack", frozenset()) | weight.known_stack()
        for path in weight.origin.paths:
            use = Use(
                path,
                *where,
                kind,
                _axes_of(path, stack),
                _axes_of(path, in_),
                _axes_of(path, out),
                window=_in_order(path, facts.get("window", ())),
                reason=facts.get("reason", ""),
                form=facts.get("form", ""),
                why=facts.get("why", ""),
                sharing=facts.get("sharing", 1),
            )
            self._uses.setdefault((eqn, use), use)


def _in_order(path: str, labels: Sequence[frozenset]) -> tuple[object, ...]:
    """Return the axes of one weight among those of several dimensions, in their order."""
    return tuple(axis for own in labels for axis in _axes_of(path, own))


def _axes_of(path: str, labels: frozenset) -> frozenset:
    """Return the axes of one weight among the labels of a probe; roles as they are."""
    return frozenset(
        label[1] if isinstance(label, tuple) else label
        for label in labels
        if not isinstance(label, tuple) or label[0] == path
    )
