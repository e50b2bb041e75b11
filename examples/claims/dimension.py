"""How many random directions does a task need?

The intrinsic dimension of Li et al. 2018 (arXiv:1804.08838), of fine-tuning as Aghajanyan et al.
2020 (arXiv:2012.13255) measure it: d90 is the least number of coordinates in a random subspace of
all parameters that reaches 90 % of the score of full fine-tuning. LoRA's paper rests on it. Where
the score is a loss, it is 90 % of what full fine-tuning takes from the loss of the pretrained
model.
"""

from collections.abc import Sequence

import jax
import numpy as np

import jaxlora

from .arms import FULL, subspace
from .fine_tuning import RATES as RATES_OF_ARMS
from .lab import Lab, Wanted
from .report import Report, as_dicts, figure, mean_and_error, nats, percent
from .tasks import Task
from .training import Run

DIMENSIONS = (127, 509, 2039, 8191)  # primes, see `arms`
RATES = (3e-4, 1e-3)
SEARCHED = 2039  # with so many coordinates the rate of a task is chosen, for all dimensions
TASKS = ("sentiment", "glosses", "fashion", "definitions")
SEEDS = {"glosses": 1, "fashion": 1, "definitions": 1}  # all where a run takes a minute


def needs(lab: Lab) -> dict[tuple[str, int], Wanted]:
    """Return the runs by task and dimension; 0 for full fine-tuning."""
    return {
        (name, dimension): Wanted(
            name, subspace(dimension), RATES, chosen_by=subspace(SEARCHED), seeds=SEEDS.get(name)
        )
        if dimension
        else Wanted(name, FULL, RATES_OF_ARMS[name][1])
        for name in lab.some(TASKS)
        for dimension in (0, *lab.some(DIMENSIONS))
    }


def run(lab: Lab) -> Report:
    """Train coordinates in random subspaces of several dimensions, at the best rate of the task."""
    rows, figures, wanted = [], {}, needs(lab)
    picture, (classes, losses) = figure(2)
    for name in lab.some(TASKS):
        task = lab.task(name)
        told = percent if task.higher_is_better else nats
        full = lab.runs(wanted[name, 0])
        found = {d: lab.runs(wanted[name, d]) for d in lab.some(DIMENSIONS)}
        goal = _goal(task, full)
        d90 = _least(task, found, goal)
        rows += [[name, f"{dimension:,}", told(runs)] for dimension, runs in found.items()]
        shown = f"{100 * goal:.1f}" if task.higher_is_better else f"{goal:.3f}"
        rows.append([name, "all parameters", f"{told(full)}; the goal is {shown}, d90 {d90}"])
        figures[name] = {"goal": goal, "d90": d90, "full": as_dicts(full)} | {
            str(dimension): as_dicts(runs) for dimension, runs in found.items()
        }
        axes, scale = (classes, 100) if task.higher_is_better else (losses, 1)
        means = [mean_and_error([scale * run.held_out for run in runs]) for runs in found.values()]
        lines = axes.errorbar(
            list(found), *zip(*means, strict=True), marker="o", capsize=3, label=name
        )
        axes.axhline(scale * goal, linestyle="--", color=lines[0].get_color())
    for axes, label in ((classes, "held out (%)"), (losses, "held out (nats a token)")):
        axes.set(xscale="log", xlabel="coordinates that are trained", ylabel=label)
        if axes.lines:
            axes.legend()
    return Report(("task", "coordinates", "held out (%, or nats)"), rows, figures, picture)


def _goal(task: Task, full: Sequence[Run]) -> float:
    """Return the score that the coordinates have to reach."""
    reached = float(np.mean([run.held_out for run in full]))
    if task.higher_is_better:
        return 0.9 * reached
    predict = jax.jit(jaxlora.lora(task.fn, strict=True))
    before = task.score(predict, task.params, "held out")
    return before - 0.9 * (before - reached)


def _least(task: Task, found: dict[int, list[Run]], goal: float) -> str:
    """Return the least dimension whose runs reach the goal, in words."""
    sign = 1 if task.higher_is_better else -1
    means = {
        dimension: np.mean([run.held_out for run in runs]) for dimension, runs in found.items()
    }
    reached = [dimension for dimension, mean in means.items() if sign * (mean - goal) >= 0]
    return f"{min(reached):,}" if reached else f"above {max(found):,}"
