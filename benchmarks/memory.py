"""Count the bytes of a compiled training step, and its arrays of the size of a weight.

For each variant of `train_step.py`: bytes of arguments, temporaries and outputs, and how many
arrays with the shape of an adapted weight the optimized program makes beyond its arguments.
"""

import argparse
import re
from typing import Any

import jax
import report
import train_step

_NOT_MADE = ("parameter", "bitcast", "get-tuple-element", "tuple")


def weight_sized(program: str, shapes: set[tuple[int, ...]]) -> int:
    """Return how many operations of optimized HLO make an array of one of these shapes."""
    made = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", program, re.M)
    sizes = [(tuple(map(int, dims.split(","))), kind) for dims, kind in made]
    return sum(dims in shapes and kind not in _NOT_MADE for dims, kind in sizes)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each variant."""
    x, y = train_step.data(options)
    found = train_step.variants(options)
    kernels = [w for w in jax.tree.leaves(found["full"][1]) if w.ndim >= 2]
    shapes = {shape for w in kernels for shape in (w.shape, w.shape[::-1])}
    rows = {}
    for name, (loss, trained, frozen) in found.items():
        step = train_step.Step(loss, trained, frozen, x, y)
        memory: Any = step.compiled.memory_analysis()
        rows[name] = {
            "argument_mb": memory.argument_size_in_bytes / 1e6,
            "temp_mb": memory.temp_size_in_bytes / 1e6,
            "output_mb": memory.output_size_in_bytes / 1e6,
            "weight_sized": weight_sized(step.compiled.as_text(), shapes),
        }
    for row in rows.values():
        row["temp_over_full"] = row["temp_mb"] / rows["full"]["temp_mb"]
    return rows


def main() -> None:
    """Run the benchmark."""
    options = train_step.parser(__doc__).parse_args()
    results = measure(options)
    report.finish(options, results)


if __name__ == "__main__":
    main()
