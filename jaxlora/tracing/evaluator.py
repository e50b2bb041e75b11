"""How programs are evaluated, and what is said and written down of the weights in them."""

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable

import jax

from jaxlora.tracing.jaxprs import compat, cost
from jaxlora.tracing.options import Options
from jaxlora.tracing.recorder import Kind, Recorder
from jaxlora.tracing.types import Eqn, Traced, Value, Values
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.chain import CHECKPOINT_NAME
from jaxlora.tracing.values.weight import Weight
from jaxlora.weights.adapters import merge_dtype

WarningKey = str | tuple[str, type[Warning], int]  # of `warnings`


class MaterializationWarning(UserWarning):
    """An adapted weight was made dense, because an operation has no low-rank rule."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
    """How programs are evaluated; of those that were it holds nothing.

    Attributes:
        options: how programs are evaluated.
        recorder: what writes down the uses of weights, or None where they are not wanted.
        warned: the registry of `warnings`: each line is warned of once.
        compiled: by inner program the function that evaluates it under `jax.jit`, so that it is
            compiled once; it goes when the program goes.
    """

    options: Options = dataclasses.field(default_factory=Options)
    recorder: Recorder | None = None
    warned: dict[WarningKey, int] = dataclasses.field(default_factory=dict)
    compiled: weakref.WeakKeyDictionary[Traced, Callable[..., Values]] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary
    )

    def derivative(self) -> "Evaluator":
        """Return an evaluator as this, for programs that have to stay linear."""
        return self._with(is_linear=True, observes=False)

    @functools.cached_property
    def rematerialized(self) -> "Evaluator":
        """An evaluator as this, for programs that are computed again in the backward pass."""
        return self if self.options.is_rematerialized else self._with(is_rematerialized=True)

    def _with(self, **options: bool) -> "Evaluator":
        changed = dataclasses.replace(self.options, **options)
        return dataclasses.replace(self, options=changed, compiled=weakref.WeakKeyDictionary())

    def densify(
        self, eqn: Eqn | None, where: tuple[str, str], value: Value, reason: str
    ) -> jax.Array:
        """Return an array for a value that reaches an operation, see `Evaluation.densify`."""
        if not isinstance(value, Weight):
            return deferred.now(value)
        is_rows, dtype = value.is_rows(), value.base.dtype
        if self.recorder is not None and is_rows:
            self.recorder.record_lookup(eqn, value)
        elif self.recorder is not None:
            self.recorder.record(eqn, where, value, Kind.MATERIALIZED, reason=reason)
        if not is_rows:
            self.warn(where, value, reason)
            dtype = merge_dtype(dtype)
        with self.scope(value):
            return value.dense(dtype)

    def leave(self, out: Value, reason: str = "") -> Value:
        """Return what leaves a program, an array for rows, and for a weight if there is a reason.

        Args:
            out: an output.
            reason: why a weight cannot leave as one.
        """
        if isinstance(out, Weight) and (reason or out.is_rows()):
            return self.densify(None, compat.where(None), out, reason)
        return out

    def scope(self, *weights: Weight) -> contextlib.AbstractContextManager[object]:
        """Return the name scope of what is added to a program for some weights."""
        if self.recorder is None:
            return jax.named_scope(CHECKPOINT_NAME)
        paths = tuple(path for weight in weights for path in weight.origin.paths)
        return jax.named_scope(cost.scope(self.recorder.number(paths)))

    def warn(self, where: tuple[str, str], weight: Weight, reason: str) -> None:
        """Warn that a weight is made dense, once for each line, or raise if that is asked for."""
        if self.recorder is not None:
            return
        what = f"the weight {weight.name!r} reaches {where[0]!r} at {where[1]}, and {reason}"
        if self.options.strict:
            raise ValueError(f"{what}: strict=True needs a low-rank rule at every use")
        warnings.warn_explicit(
            f"{what}: it is materialized there",
            MaterializationWarning,
            *compat.file_and_number(where[1]),
            registry=self.warned,
        )
