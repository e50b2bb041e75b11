"""Do adapters of other ranks, or of other seeds, learn the same directions?

Hu et al. 2021 (arXiv:2106.09685), section 7.2: figures 3 and 4.
"""

import itertools

import numpy as np

from jaxlora import analysis

from .arms import lora
from .lab import Lab, Wanted
from .ranks_and_weights import RATES
from .rates import TASK
from .report import Report, figure

RANKS = (8, 64)
DRAWN = "layer_2"  # the layer of the heat maps; the table has the median of all


def needs(lab: Lab) -> dict[int, Wanted]:
    """Return the runs by rank."""
    ranks = (2, 3) if lab.quick else RANKS
    return {rank: Wanted(TASK, lora(rank, "q,v"), RATES) for rank in ranks}


def run(lab: Lab) -> Report:
    """Compare adapters on query and value by their products, and by a alone as the paper."""
    small, large = needs(lab).values()
    first = lab.best_trainable(small, seed=0).adapters
    second = lab.best_trainable(large, seed=0).adapters
    other = lab.best_trainable(large, seed=1).adapters
    pairs = {
        f"rank {small.arm.rank} and rank {large.arm.rank}": (first, second),
        f"two seeds, rank {large.arm.rank}": (second, other),
    }
    rows, figures = [], {}
    picture, axes = figure(4, 4.2)
    drawn = iter(axes)
    for (name, pair), of in itertools.product(pairs.items(), ("product", "factor")):
        phi = analysis.similarity(*pair, of=of)
        for kind in ("query", "value"):
            paths = [path for path in phi if f"/{kind}/" in path]
            of_layers = np.stack([np.asarray(phi[path]) for path in paths])  # (layers, r1, r2)
            rows.append([name, kind, of, *_told(np.median(of_layers, axis=0), lab)])
            ends = of_layers[:, (0, 0, -1), (0, -1, -1)]  # of each layer, as in the table
            figures[f"{name}, {kind}, {of}"] = np.round(ends, 3).tolist()
            if of == "product":
                one = next((path for path in paths if DRAWN in path), paths[0])
                ax = analysis.plot.similarity(phi[one], next(drawn))
                ax.set_title(f"{name}\n{'/'.join(one.split('/')[1:3])}")
    columns = (
        *("adapters", "weights", "directions of the"),
        *("φ(1, 1)", "φ(1, all)", "φ(all, all)", "random, φ(all, all)"),
    )
    return Report(columns, rows, figures, picture)


def _told(phi: np.ndarray, lab: Lab) -> list[str]:
    """Return the first and last of φ ``(r1, r2)``, and what random directions would have."""
    width = lab.task(TASK).params["encoder"]["layer_0"]["query"]["kernel"].shape[0]
    return [f"{x:.2f}" for x in (phi[0, 0], phi[0, -1], phi[-1, -1], max(phi.shape) / width)]
