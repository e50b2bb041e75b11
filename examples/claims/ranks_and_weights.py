"""Is rank 1 enough, and which weights are best adapted for an equal number of parameters?

Hu et al. 2021 (arXiv:2106.09685), sections 7.1 and 7.2: tables 5 and 6.
"""

from .arms import lora
from .lab import Lab, Wanted
from .rates import TASK
from .report import Report, as_dicts, figure, mean_and_error, percent

RATES = (1.5e-3, 5e-3)
RANKS = (1, 2, 4, 8, 64)  # on query and value, as in table 6
BUDGET = (  # weights and ranks with about 74,000 parameters in all
    *(("q", 16), ("k", 16), ("v", 16), ("o", 16)),
    *(("q,v", 8), ("q,k,v,o", 4), ("mlp", 3), ("all", 2)),
)


def needs(lab: Lab) -> dict[str, Wanted]:
    """Return the runs by weights and rank."""
    adapted = (*(("q,v", rank) for rank in lab.some(RANKS)), *lab.some(BUDGET))
    return {
        f"{weights}, rank {rank}": Wanted(TASK, lora(rank, weights), RATES)
        for weights, rank in adapted
    }


def run(lab: Lab) -> Report:
    """Train LoRA of several ranks, and of several sets of weights, each at its best rate."""
    found = {name: lab.runs(wanted) for name, wanted in needs(lab).items()}
    ranks = [f"q,v, rank {rank}" for rank in lab.some(RANKS)]
    weights = [f"{weights}, rank {rank}" for weights, rank in lab.some(BUDGET)]
    rows = [
        [name, f"{runs[0].trained:,}", f"{runs[0].rate:g}", percent(runs)]
        for name, runs in found.items()
    ]
    picture, (left, right) = figure(2)
    for axes, names, title in ((left, ranks, "rank"), (right, weights, "equal parameters")):
        means = [mean_and_error([100 * run.held_out for run in found[name]]) for name in names]
        axes.errorbar(names, *zip(*means, strict=True), marker="o", capsize=3, linestyle="")
        axes.tick_params("x", rotation=45)
        axes.set(title=title, ylabel="held out (%)")
    left.sharey(right)
    figures = {name: as_dicts(runs) for name, runs in found.items()}
    columns = ("adapted", "trained, with the head", "rate", "held out (%)")
    return Report(columns, rows, figures, picture)
