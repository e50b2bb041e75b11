"""Programs of several processes: one action in all, and what goes wrong in one raised in all."""

from collections.abc import Callable
from types import MappingProxyType
from typing import TypeVar, cast

import jax
import numpy as np

from jaxlora.types import Leaf

_LONGEST = 1000  # bytes that are sent to other processes
_KINDS = (FileExistsError, FileNotFoundError, ImportError, OSError, TimeoutError, TypeError)
_TOLD = MappingProxyType({kind.__name__: kind for kind in (*_KINDS, ValueError)})
T = TypeVar("T")


def together(call: str, action: Callable[[], T], *, first_alone: bool = False) -> T:
    """Run an action in every process or the first alone, and raise in all what one raises.

    Args:
        call: name of the public function that needs it, for errors.
        action: what to run.
        first_alone: whether the first process alone runs it; the others get None.

    Raises:
        RuntimeError: another process has ended, or does not answer.
    """
    result, error = None, None
    try:
        if not first_alone or jax.process_index() == 0:
            result = action()
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        _raise_of_another(call, error)
    if error is not None:
        raise error
    return cast(T, result)


def gathered(call: str, text: str) -> list[str]:
    """Return what each process says, in their order; the first 1000 bytes of it."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    sent = np.frombuffer(text.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    try:
        rows = np.asarray(multihost_utils.process_allgather(sent))
    except Exception as error:  # of Gloo, NCCL or the coordination service
        raise RuntimeError(
            f"{call} needs every process of the program, and another one has ended or does not "
            f"answer: see what that one has raised or why it was ended, and start all of them "
            f"again ({_first_line(error)})"
        ) from error
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def whole(array: Leaf) -> np.ndarray:
    """Return all of an array, which may be on several devices and processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _raise_of_another(call: str, error: Exception | None) -> None:
    """Wait for every process, tell them the error of this one, and raise the first of theirs."""
    number = getattr(error, "errno", None) or ""
    said = "" if error is None else f"{type(error).__name__} {number}: {_message(error)}"
    for process, sent in enumerate(gathered(call, said)):
        if sent and error is None:
            kind, _, message = sent.partition(": ")
            name, _, number = kind.partition(" ")
            message = f"{message} (in process {process})"
            if number:
                raise OSError(int(number), message)
            raise _TOLD.get(name, RuntimeError)(message)


def _message(error: Exception) -> str:
    """Return the text of an error, without the number that an `OSError` puts before it."""
    return str(getattr(error, "strerror", None) or error)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
