"""What is written down while a program is evaluated: each operation that consumes a weight."""

import dataclasses
from typing import Any

from jaxlora.tracing.values.lowrank import LowRank

CONTRACTED, LOOKED_UP, MATERIALIZED = "contracted", "looked up", "materialized"


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a weight.

    Attributes:
        path: path of the weight.
        operation: name of the primitive.
        source: line of the user's program, ``file:line``.
        kind: "contracted", "looked up" or "materialized".
        stack: axes of the weight that are a stack here.
        in_: axes contracted or looked up along.
        out: axes left in the result.
        reason: why the weight was materialized.
        form: the form of a product where it is differentiated, see `jaxlora.lora`.
        sharing: the number of products of one input that share the product with their first
            factors, this among them.
    """

    path: str
    operation: str
    source: str
    kind: str
    stack: frozenset = frozenset()
    in_: frozenset = frozenset()
    out: frozenset = frozenset()
    reason: str = ""
    form: str = ""
    sharing: int = 1


class Recorder:
    """The uses met so far, and the number by which `cost.scope` knows the paths of a weight."""

    def __init__(self):
        self._uses: dict[Any, tuple[Any, Use]] = {}
        self.numbers: dict[tuple[str, ...], int] = {}

    @property
    def uses(self) -> list[Use]:
        """The uses in the order they were met; a loop's body that is run again counts once."""
        return [use for _, use in self._uses.values()]

    def number(self, paths: tuple[str, ...]) -> int:
        """Return the number of the weight of these paths."""
        return self.numbers.setdefault(paths, len(self.numbers))

    def record(
        self, eqn: Any, where: tuple[str, str], weight: LowRank, kind: str, **fields: Any
    ) -> None:
        """Write down a use of a weight; a lookup tells its axes from what was picked.

        Args:
            eqn: the equation that uses it, None for the end of the program.
            where: operation and line of the user's program.
            weight: the weight.
            kind: what becomes of it.
            **fields: of `Use`, the axes as labels.
        """
        if kind == LOOKED_UP:
            where, every = weight.picked_at, weight.labels(*range(len(weight.dims)))
            out = every - weight.picked - weight.scanned
            fields |= {"in_": weight.picked, "out": out, "stack": frozenset()}
        if "stack" in fields:
            fields["stack"] |= weight.scanned
        for path in weight.origin.paths:
            own: dict[str, Any] = {
                name: _axes_of(path, value) if isinstance(value, frozenset) else value
                for name, value in fields.items()
            }
            use = Use(path, *where, kind, **own)
            self._uses.setdefault((id(eqn), use), (eqn, use))  # with eqn, so that its id stays its


def _axes_of(path: str, labels: frozenset) -> frozenset:
    """Return the axes of one weight among the labels of a probe; roles as they are."""
    return frozenset(
        label[1] if isinstance(label, tuple) else label
        for label in labels
        if not isinstance(label, tuple) or label[0] == path
    )
