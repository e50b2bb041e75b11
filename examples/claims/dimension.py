"""How many random directions does a task need?

The intrinsic dimension of Li et al. 2018 (arXiv:1804.08838), of fine-tuning as Aghajanyan et al.
2020 (arXiv:2012.13255) measure it: d90 is the least number of coordinates in a random subspace of
all parameters that reaches 90 % of the score of full fine-tuning. LoRA's paper rests on it.
"""

import numpy as np

from .arms import FULL, subspace
from .lab import Lab
from .rates import FULL_RATES
from .report import Report, as_dicts, figure, mean_and_error, percent

DIMENSIONS = (31, 509, 8191)  # primes, see `arms`
RATES = (3e-4, 1e-3)
TASKS = ("sentiment", "glosses")


def run(lab: Lab) -> Report:
    """Train coordinates in random subspaces of several dimensions, each at its best rate."""
    rows, figures = [], {}
    picture, axes = figure()
    for task in lab.some(TASKS):
        full = lab.runs(task, FULL, lab.best_rate(task, FULL, FULL_RATES[1:]))
        goal = 0.9 * np.mean([run.held_out for run in full])
        found = {}
        for dimension in lab.some(DIMENSIONS):
            arm = subspace(dimension)
            found[dimension] = lab.runs(task, arm, lab.best_rate(task, arm, RATES))
        reached = [d for d, runs in found.items() if np.mean([r.held_out for r in runs]) >= goal]
        rows += [[task, str(dimension), percent(runs)] for dimension, runs in found.items()]
        d90 = f"{min(reached)}" if reached else f"above {max(found)}"
        rows.append(
            [task, "all parameters", f"{percent(full)}; 90 % of it is {100 * goal:.1f}, d90 {d90}"]
        )
        figures[task] = {"d90": d90, "full": as_dicts(full)} | {
            str(dimension): as_dicts(runs) for dimension, runs in found.items()
        }
        means = [mean_and_error([100 * run.held_out for run in runs]) for runs in found.values()]
        lines = axes.errorbar(
            list(found), *zip(*means, strict=True), marker="o", capsize=3, label=task
        )
        axes.axhline(100 * goal, linestyle="--", color=lines[0].get_color())
    axes.set(xscale="log", xlabel="coordinates that are trained", ylabel="held out (%)")
    axes.legend()
    return Report(("task", "coordinates", "held out (%)"), rows, figures, picture)
