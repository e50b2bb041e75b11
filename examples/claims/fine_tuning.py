"""Does LoRA do as well as full fine-tuning, and what do both cost and forget?

Hu et al. 2021 (arXiv:2106.09685), table 2, with BitFit (Zaken et al. 2021, arXiv:2106.10199), a
head alone and a probe beside them.
"""

import dataclasses
from collections.abc import Callable

from .arms import COMPARED
from .lab import Lab, Wanted
from .rates import FULL_RATES, LORA_RATES
from .report import Report, as_dicts, figure, mean_and_error, nats, percent
from .training import Run, seconds_of_steps

RATES = {  # of each arm; the head of the glosses sees larger vectors
    "sentiment": (LORA_RATES, FULL_RATES, (1.5e-3, 5e-3, 1.5e-2), (5e-3, 1.5e-2, 5e-2)),
    "glosses": (LORA_RATES[1:], FULL_RATES[1:], (5e-4, 1.5e-3, 5e-3), (2.5e-4, 7.5e-4, 2.5e-3)),
    "definitions": ((5e-4, 1.5e-3), (5e-5, 1.5e-4), (1.5e-3, 5e-3), (1.5e-4, 5e-4)),
    "fashion": (LORA_RATES[2:], FULL_RATES[2:], (5e-3, 1.5e-2), (5e-3, 1.5e-2)),
}
COLUMNS = (
    *("task", "trained", "rate", "held out", "other data before", "other data after"),
    *("parameters", "MB of a step", "s a step"),
)


def needs(lab: Lab) -> dict[tuple[str, str], Wanted]:
    """Return the runs by task and arm."""
    return {
        (name, arm.name): Wanted(name, arm, rates)
        for name, of_arms in RATES.items()
        for arm, rates in lab.some(tuple(zip(COMPARED, of_arms, strict=True)))
    }


def run(lab: Lab) -> Report:
    """Train each arm on each task, at the best of a few rates."""
    rows, figures, wanted = [], {}, needs(lab)
    picture, axes = figure(len(RATES))
    for name, ax in zip(RATES, axes, strict=True):
        task = lab.task(name)
        told = percent if task.higher_is_better else nats
        before, probed = task.general(task.params), task.probe()
        found = {arm.name: lab.runs(wanted[name, arm.name]) for arm in lab.some(COMPARED)}
        seconds = seconds_of_steps(task, lab.some(COMPARED), 2 if lab.quick else 15)
        if probed is not None:
            rows.append([name, "probe", "", f"{100 * probed:.1f}", *[""] * 5])
        rows += [
            [name, arm, *_told(runs, before, told), f"{seconds[arm]:.2f}"]
            for arm, runs in found.items()
        ]
        figures[name] = {"probe": probed, "other data before": before, "seconds": seconds}
        figures[name] |= {arm: as_dicts(runs) for arm, runs in found.items()}
        scale = 100 if task.higher_is_better else 1
        means = [mean_and_error([scale * run.held_out for run in runs]) for runs in found.values()]
        ax.errorbar(list(found), *zip(*means, strict=True), marker="o", capsize=3, linestyle="")
        if probed is not None:
            ax.axhline(100 * probed, color="0.4", linestyle="--", label="probe")
            ax.legend()
        ax.tick_params("x", rotation=20)
        ax.set(title=name, ylabel="held out (%)" if task.higher_is_better else "nats a token")
    return Report(COLUMNS, rows, figures, picture)


def _told(runs: list[Run], before: float, told: Callable[..., str]) -> list[str]:
    first = runs[0]
    return [
        f"{first.rate:g}",
        told(runs),
        told([dataclasses.replace(first, general=before)], "general"),
        told(runs, "general"),
        f"{first.trained:,}",
        f"{first.bytes / 1e6:,.0f}",
    ]
