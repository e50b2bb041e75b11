"""Does an adapter amplify directions that the weight has, but does not stress?

Hu et al. 2021 (arXiv:2106.09685), section 7.3 and table 7, of one query weight of GPT-3.
"""

import numpy as np

from jaxlora import analysis

from .arms import lora
from .lab import Lab, Wanted
from .ranks_and_weights import RATES
from .rates import TASK
from .report import Report, figure

PAPER = {  # norms of ΔW, of W, and of W in directions of ΔW, in its own and in random ones
    4: (6.91, 61.95, 0.32, 21.67, 0.02),
    64: (3.57, 61.95, 1.90, 37.71, 0.33),
}
COLUMNS = ("ΔW", "W", "W in directions of ΔW", "in its own", "in random ones", "amplification")


def needs(lab: Lab) -> dict[int, Wanted]:
    """Return the runs by rank."""
    return {rank: Wanted(TASK, lora(rank, "q,v"), RATES) for rank in lab.some(tuple(PAPER))}


def run(lab: Lab) -> Report:
    """Measure the norms of table 7 for adapters of rank 4 and 64 on query and value."""
    params = lab.task(TASK).params
    rows, figures, amplified = [], {}, {}
    for rank, wanted in needs(lab).items():
        adapters = lab.best_trainable(wanted, seed=0).adapters
        norms = analysis.amplification(params, adapters).norms
        for kind in ("query", "value"):
            of_layers = np.array(
                [
                    (n.product, n.weight, n.within_product, n.within_weight, n.within_random)
                    for path, n in norms.items()
                    if f"/{kind}/" in path
                ]
            )  # (layers, 5)
            name = f"rank {rank}, {kind}"
            rows.append(_row(name, np.median(of_layers, axis=0)))
            figures[name] = np.round(of_layers, 4).tolist()
            amplified[name] = of_layers[:, 0] / of_layers[:, 2]
        rows.append(_row(f"rank {rank}, GPT-3 query (paper)", np.array(PAPER[rank])))
    picture, axes = figure()
    for name, values in amplified.items():
        axes.plot(values, "o-", label=name)
    axes.set(xlabel="layer", ylabel="amplification", yscale="log")
    axes.legend()
    return Report(("adapters", *COLUMNS), rows, figures, picture)


def _row(name: str, norms: np.ndarray) -> list[str]:
    return [name, *(f"{x:.2f}" for x in norms), f"{norms[0] / norms[2]:.1f}"]
