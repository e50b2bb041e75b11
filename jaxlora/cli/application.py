"""The commands, and what all of them have in common: each is a function of its own file."""

from collections.abc import Callable
from typing import Annotated

import typer

from jaxlora.cli import (
    benchmarking,
    combining,
    comparing,
    converting,
    inspecting,
    merging,
    plans,
    similarities,
    spectra,
    truncating,
)
from jaxlora.cli.errors import told
from jaxlora.version import __version__

app = typer.Typer(
    help="Look at, merge, convert and combine adapters in folders, and plan runs.",
    epilog="Exit codes: 0 done; 1 what was asked about is not well or differs; 2 it could not be "
    "done, and nothing was written.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMMANDS: tuple[Callable[..., None], ...] = (
    inspecting.inspect,
    comparing.diff,
    merging.merge,
    converting.convert,
    combining.combine,
    truncating.truncate,
    spectra.spectrum,
    similarities.similarity,
    plans.plan,
    benchmarking.bench,
)


def _add(command: Callable[..., None]) -> None:
    """Add a command, whose docstring is its help, with an example at the end."""
    text, _, example = (command.__doc__ or "").partition("Example:")
    app.command(help=text, epilog=f"Example: {example.strip()}")(told(command))


for each in COMMANDS:
    _add(each)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Look at, merge, convert and combine adapters in folders, and plan runs."""
