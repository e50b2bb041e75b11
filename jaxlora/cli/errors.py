"""Errors and warnings of the library as one line each, on the standard error."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

P = ParamSpec("P")
T = TypeVar("T")

FAILED = 2
# what the library raises for what it is given, and Python and JAX for want of memory
_EXPECTED = (OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError)


def told(command: Callable[P, T]) -> Callable[P, T]:
    """Return a command that tells what it cannot do in one line, and ends with exit code 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's, beside what it raises
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show
            try:
                return command(*args, **kwargs)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except _EXPECTED as error:
                _tell("error", error)
                raise typer.Exit(FAILED) from None
            except Exception as error:  # of a model that is traced
                _tell("error", f"{type(error).__name__}: {error}")
                raise typer.Exit(FAILED) from None

    return run


def _show(message: Warning | str, *_: object) -> None:
    _tell("warning", message)


def _tell(kind: str, message: object) -> None:
    """Print a message of the library, whose lines are the parts of a list."""
    first, *others = (line.strip() for line in str(message).splitlines() or [""])
    text = " ".join([first, "; ".join(others)]).strip() or type(message).__name__
    print(f"jaxlora: {kind}: {text}", file=sys.stderr)
