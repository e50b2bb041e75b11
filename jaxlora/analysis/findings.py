"""What an analysis finds of each weight, by path."""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from jaxlora.messages import table
from jaxlora.weights import paths

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Findings(Mapping[str, T], Generic[T]):
    """What is found of each weight; index it by path, iterate it, or print it.

    Attributes:
        found: what is found, by path.
        left_out: names of what is trained and was not looked at: leaves that are trained
            themselves, and have no factors; what one of two sets has alone.
    """

    header: ClassVar[tuple[str, ...]]  # of the columns behind the path

    found: dict[str, T]
    left_out: tuple[str, ...]

    @abc.abstractmethod
    def cells(self, path: str) -> tuple[str, ...]:
        """Return what the table says of a weight, for each column of the header."""

    def __getitem__(self, path: str) -> T:
        if path not in self.found:
            raise KeyError(f"nothing was found of {path!r}; {paths.nearest(path, self.found)}")
        return self.found[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        rows = [(path, *self.cells(path)) for path in self.found]
        text = table.render_folded(("path", *self.header), rows)
        return "\n\n".join([text, *self.notes()])

    __repr__ = __str__

    def notes(self) -> list[str]:
        """Return what stands below the table."""
        return [f"not looked at: {', '.join(self.left_out)}"] if self.left_out else []


F = TypeVar("F", bound=Findings[Any])


def register(cls: type[F]) -> type[F]:
    """Make a class of findings a pytree, so that functions under `jax.jit` can return it."""
    arrays = [field.name for field in dataclasses.fields(cls) if field.name != "left_out"]
    jax.tree_util.register_dataclass(cls, arrays, ["left_out"])
    return cls


def told(value: jax.Array, form: str = ".3g") -> str:
    """Return a number, or the smallest and the largest of an array, as text."""
    if isinstance(value, Tracer):
        return "traced"
    low, high = (format(float(bound(value)), form) for bound in (np.min, np.max))
    return low if low == high else f"{low} to {high}"
