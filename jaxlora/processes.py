"""Programs of several processes: one action in all, and what goes wrong in one raised in all."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np

_LONGEST = 1000  # bytes of an error that other processes are told
_TOLD = {kind.__name__: kind for kind in (FileExistsError, FileNotFoundError, ValueError)}
T = TypeVar("T")


def together(action: Callable[[], T], *, first_alone: bool = False) -> T:
    """Run an action in every process or the first alone, and raise in all what one raises."""
    result, error = None, None
    try:
        if not first_alone or jax.process_index() == 0:
            result = action()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        _raise_of_another(error)
    if error is not None:
        raise error
    return cast(T, result)


def _raise_of_another(error: Exception | None) -> None:
    """Wait for every process, tell them the error of this one, and raise the first of theirs."""
    from jax.experimental import multihost_utils

    text = "" if error is None else f"{type(error).__name__}: {error}"
    sent = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST), np.uint8)
    for process, row in enumerate(np.asarray(multihost_utils.process_allgather(sent))):
        told = row.tobytes().decode(errors="ignore").strip()
        if told and error is None:
            name, _, message = told.partition(": ")
            raise _TOLD.get(name, RuntimeError)(f"{message} (in process {process})")
