"""Is the best learning rate of LoRA ten times that of full fine-tuning, and does rank move it?

Thinking Machines 2025 ("LoRA Without Regret") says ten times. Kalajdzievski 2023
(arXiv:2312.03732) says that alpha / √rank keeps learning stable as the rank grows, and alpha / rank
does not.
"""

import math

from .arms import FULL, lora
from .lab import Lab, Wanted
from .report import Report, as_dicts, figure, mean_and_error, percent

TASK = "sentiment"
LORA_RATES = (1.5e-4, 5e-4, 1.5e-3, 5e-3)
FULL_RATES = (1.5e-5, 5e-5, 1.5e-4, 5e-4)
RANKS = (4, 64)  # and 8, where both scalings are 2
SCALINGS = {"alpha / rank": (16.0, False), "alpha / √rank": (2 * math.sqrt(8), True)}


def needs(lab: Lab) -> dict[tuple[str, float], Wanted]:
    """Return the runs by arm and rate, and by scaling and rank."""
    arms = ((lora(8), LORA_RATES), (FULL, FULL_RATES))
    wanted = {
        (arm.name, rate): Wanted(TASK, arm, (rate,))
        for arm, rates in arms
        for rate in lab.some(rates)
    }
    for name, (alpha, stabilized) in SCALINGS.items():
        of_ranks = {r: lora(r, alpha=alpha, stabilized=stabilized) for r in lab.some(RANKS)}
        wanted |= {
            (name, rank): Wanted(TASK, arm, LORA_RATES, chosen_by=lora(8))
            for rank, arm in sorted((of_ranks | {8: lora(8)}).items())
        }
    return wanted


def run(lab: Lab) -> Report:
    """Train LoRA and everything at several rates, and LoRA of several ranks at one."""
    rows, found = [], {}
    for (name, at), wanted in needs(lab).items():
        runs = lab.runs(wanted)
        found.setdefault(name, {})[at] = runs
        told = f"{name}, rank {at}" if name in SCALINGS else name
        rows.append([told, f"{runs[0].rate:g}", percent(runs)])
    picture, (left, right) = figure(2)
    for name, of_name in found.items():
        _draw(right if name in SCALINGS else left, name, of_name)
    rate = lab.best_rate(Wanted(TASK, lora(8), LORA_RATES))
    left.set(xscale="log", xlabel="learning rate", ylabel="held out (%)")
    right.set(xscale="log", xlabel=f"rank, at rate {rate:g}", ylabel="held out (%)")
    right.set_xticks([4, 8, 64], ["4", "8", "64"], minor=False)
    right.xaxis.set_minor_formatter("")
    left.legend()
    right.legend()
    figures = {
        name: {f"{at:g}": as_dicts(runs) for at, runs in of_name.items()}
        for name, of_name in found.items()
    }
    return Report(("trained", "rate", "held out (%)"), rows, figures, picture)


def _draw(axes, name, found):
    means = [mean_and_error([100 * run.held_out for run in runs]) for runs in found.values()]
    axes.errorbar(list(found), *zip(*means, strict=True), marker="o", capsize=3, label=name)
