"""Measure what a step costs against tokens, rank, number of adapted layers and devices.

One of them at a time is changed from the model of `train_step.py`. Each is measured as there, next
to the frozen model and full fine-tuning of the same sizes. With several devices the batch is parted
over them; on a CPU they share its cores, so that the ratios tell of the program and not of speed.
"""

import argparse
from typing import Any

import jax
import models
import report
import train_step

from jaxlora.messages import table

SWEEPS: dict[str, list[dict[str, Any]]] = {
    "tokens": [{"batch": batch} for batch in (1, 2, 4, 8, 16)],
    "rank": [{"rank": rank} for rank in (1, 4, 8, 16, 64)],
    "sites": [{"targets": targets} for targets in (("q",), ("q", "v"), tuple("qkvo"))]
    + [{"targets": models.TARGETS}],
    "devices": [{"devices": count} for count in (1, 2, 4, 8)],
}


def value_of(sweep: str, options: argparse.Namespace) -> int:
    """Return the number that a sweep changes."""
    return {
        "tokens": options.batch * options.time,
        "rank": options.rank,
        "sites": options.layers * len(options.targets),
        "devices": options.devices,
    }[sweep]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the figures of the adapted step at each point of each sweep."""
    rows = []
    for sweep, points in SWEEPS.items():
        for changed in points:
            at = argparse.Namespace(**{**vars(options), **changed})
            if at.devices > len(jax.devices()):
                continue
            figures = train_step.measure(at)["lora"]
            rows.append({"sweep": sweep, "at": value_of(sweep, at), **figures})
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = train_step.parser(__doc__)
    parser.set_defaults(layers=2, variants=["floor", "full", "lora"])
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", SWEEPS["devices"][-1]["devices"])
    rows = measure(options)
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    print(table.render(list(rows[0]), cells))
    report.write(options, rows)


if __name__ == "__main__":
    main()
