"""What a claim came to: a table, the figures behind it, and a picture."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np

from .training import Run


@dataclasses.dataclass
class Report:
    """What a claim came to.

    Attributes:
        columns: of the table.
        rows: of the table: what a reader sees.
        figures: the numbers behind the table, for JSON.
        picture: drawn with matplotlib.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Mapping[str, Any]
    picture: matplotlib.figure.Figure

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def save(self, path: Path) -> None:
        """Write JSON, and beside it the picture."""
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": jax.devices()[0].device_kind,
            "columns": self.columns,
            "rows": self.rows,
            "figures": self.figures,
        }
        path.write_text(json.dumps(about, indent=1) + "\n")
        self.picture.savefig(path.with_suffix(".png"), dpi=80)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; of one value the error is NaN."""
    found = np.asarray(values)
    error = found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
    return float(found.mean()), float(error)


def percent(runs: Sequence[Run], field: str = "held_out") -> str:
    """Return a mean with its standard error, in percent."""
    mean, error = mean_and_error([100 * getattr(run, field) for run in runs])
    return f"{mean:.1f}" if np.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def nats(runs: Sequence[Run], field: str = "held_out") -> str:
    """Return a mean with its standard error, in nats."""
    mean, error = mean_and_error([getattr(run, field) for run in runs])
    return f"{mean:.3f}" if np.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def as_dicts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return runs for JSON, with figures of four digits."""
    return [
        {
            field: float(f"{value:.4g}") if isinstance(value, float) else value
            for field, value in dataclasses.asdict(run).items()
        }
        for run in runs
    ]


def figure(columns: int = 1, height: float = 3.6) -> tuple[matplotlib.figure.Figure, Any]:
    """Return a new figure and its axes, without a window."""
    picture = matplotlib.figure.Figure(figsize=(4.6 * columns, height), layout="constrained")
    return picture, picture.subplots(1, columns)
