"""Show and write what a benchmark measured, and on what."""

import argparse
import json
import platform
from typing import Any

import jax

from jaxlora.messages import table


def finish(
    options: argparse.Namespace, results: dict[str, dict[str, Any]], device: str | None = None
) -> None:
    """Print a row of figures for each variant, and write them, see `write`."""
    columns = list(next(iter(results.values())))
    rows = [[name, *(f"{row[c]:.2f}" for c in columns)] for name, row in results.items()]
    print(table.render(["variant", *columns], rows))
    write(options, results, device)


def write(options: argparse.Namespace, results: Any, device: str | None = None) -> None:
    """Write the results as JSON to ``options.out``, if it is given.

    Args:
        options: of the benchmark.
        results: what it measured.
        device: what that is of, default the device that ran it.
    """
    if options.out is None:
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": device or jax.devices()[0].device_kind,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "results": results,
    }
    options.out.write_text(json.dumps(about, indent=2) + "\n")
