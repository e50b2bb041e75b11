"""The command line, ``jaxlora``, for which the extra ``cli`` is needed.

Each command is one function of one file, which `jaxlora.cli.application` lists. It reads folders,
calls the library, and reports. Exit codes: 0 it is done; 1 what was asked about is not well or
differs; 2 it could not be done, and nothing was written.
"""

import importlib.util
import sys


def main() -> None:
    """Run the command line."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"jaxlora: the command line needs {' and '.join(missing)}: install jaxlora[cli]",
            file=sys.stderr,
        )
        sys.exit(2)
    from jaxlora.cli.application import app

    app(prog_name="jaxlora")
