"""Do adapters of other ranks, or of other seeds, learn the same directions?

Hu et al. 2021 (arXiv:2106.09685), section 7.2: figures 3 and 4.
"""

import numpy as np

from jaxlora import analysis

from .arms import lora
from .lab import Lab
from .ranks_and_weights import RATES
from .rates import TASK
from .report import Report, figure

RANKS = (8, 64)
DRAWN = "layer_2"  # the layer of the heat maps; the table has the median of all


def run(lab: Lab) -> Report:
    """Compare adapters on query and value by the directions of their factors a, as the paper."""
    rate = lab.best_rate(TASK, lora(8, "q,v"), RATES)
    small, large = (2, 3) if lab.quick else RANKS

    def adapters(rank, seed):
        return lab.trainable(TASK, lora(rank, "q,v"), rate, seed).adapters

    first, second = adapters(small, 0), adapters(large, 0)
    found = {
        f"rank {small} and rank {large}": analysis.similarity(first, second, of="factor"),
        f"two seeds, rank {large}": analysis.similarity(second, adapters(large, 1), of="factor"),
    }
    rows, figures = [], {}
    picture, axes = figure(4, 4.2)
    drawn = iter(axes)
    for name, phi in found.items():
        for kind in ("query", "value"):
            paths = [path for path in phi if f"/{kind}/" in path]
            of_layers = np.stack([np.asarray(phi[path]) for path in paths])  # (layers, r1, r2)
            rows.append([name, kind, *_told(np.median(of_layers, axis=0), lab)])
            figures[f"{name}, {kind}"] = np.round(of_layers, 3).tolist()
            one = next((path for path in paths if DRAWN in path), paths[0])
            ax = analysis.plot.similarity(phi[one], next(drawn))
            ax.set_title(f"{name}\n{'/'.join(one.split('/')[1:3])}")
    columns = ("adapters", "weights", "φ(1, 1)", "φ(1, all)", "φ(all, all)", "random, φ(all, all)")
    return Report(columns, rows, figures, picture)


def _told(phi: np.ndarray, lab: Lab) -> list[str]:
    """Return the first and last of φ ``(r1, r2)``, and what random directions would have."""
    width = lab.task(TASK).params["encoder"]["layer_0"]["query"]["kernel"].shape[0]
    return [f"{x:.2f}" for x in (phi[0, 0], phi[0, -1], phi[-1, -1], max(phi.shape) / width)]
