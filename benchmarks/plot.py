"""Draw how long a training step takes, from the results of `run.py`.

One panel for each result of `train_step.py` in a folder: for each variant the time of a step over
that through the frozen model; PEFT, over its own frozen model on PyTorch, in those of the same
model. Writes ``steps_<device>.svg`` there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

SAME_MODEL = ("layers", "width", "hidden", "batch", "time", "rank")


def panels(folder: Path, device: str) -> dict[str, dict[str, float]]:
    """Return the ratios to the floor by variant, for each result by name."""

    def read(prefix: str) -> dict[str, Any]:
        found = sorted(folder.glob(f"{prefix}*_{device}_*.json"))
        return {path.stem: json.loads(path.read_text()) for path in found}

    torch = read("peers_torch").values()
    rows = {}
    for name, found in read("train_step").items():
        rows[name] = {key: row["over_floor"] for key, row in found["results"].items()}
        ours = found["options"]
        for theirs in torch:
            same = all(ours[key] == theirs["options"][key] for key in SAME_MODEL)
            if same and ours["dtype"] == "float32":
                rows[name]["PEFT on PyTorch"] = theirs["results"]["peft"]["over_floor"]
    return rows


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the panels, one beside the other."""
    figure, every = plt.subplots(
        1, len(rows), figsize=(4.2 * len(rows), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (name, row) in zip(every[0], rows.items(), strict=True):
        ordered = sorted(row, key=lambda variant: -row[variant])
        colors = ["C0" if variant == "lora" else "0.7" for variant in ordered]
        bars = axes.barh(ordered, [row[variant] for variant in ordered], color=colors)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_xlim(0, 1.15 * max(row.values()))
        axes.set_title(name, fontsize="small")
        axes.set_xlabel("time of a step over the frozen model's")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw the results of each device in a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the results")
    folder = parser.parse_args().folder
    devices = sorted({path.stem.split("_")[-2] for path in folder.glob("train_step*.json")})
    if not devices:
        parser.error(f"no results of train_step.py in {folder}: run benchmarks/run.py first")
    for device in devices:
        path = folder / f"steps_{device}.svg"
        draw(panels(folder, device), path)
        print(path)


if __name__ == "__main__":
    main()
