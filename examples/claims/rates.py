"""Is the best learning rate of LoRA ten times that of full fine-tuning, and does rank move it?

Thinking Machines 2025 ("LoRA Without Regret") says ten times. Kalajdzievski 2023
(arXiv:2312.03732) says that alpha / √rank keeps learning stable as the rank grows, and alpha / rank
does not.
"""

import math

from .arms import FULL, lora
from .lab import Lab
from .report import Report, as_dicts, figure, mean_and_error, percent

TASK = "sentiment"
LORA_RATES = (1.5e-4, 5e-4, 1.5e-3, 5e-3)
FULL_RATES = (1.5e-5, 5e-5, 1.5e-4, 5e-4)
RANKS = (4, 64)  # and 8, where both scalings are 2


def run(lab: Lab) -> Report:
    """Train LoRA and everything at several rates, and LoRA of several ranks at one."""
    rows, figures = [], {}
    picture, (left, right) = figure(2)
    for arm, rates in ((lora(8), LORA_RATES), (FULL, FULL_RATES)):
        found = {rate: lab.runs(TASK, arm, rate) for rate in lab.some(rates)}
        rows += [[arm.name, f"{rate:g}", percent(runs)] for rate, runs in found.items()]
        figures[arm.name] = {f"{rate:g}": as_dicts(runs) for rate, runs in found.items()}
        _draw(left, arm.name, found)
    left.set(xscale="log", xlabel="learning rate", ylabel="held out (%)")
    rate = lab.best_rate(TASK, lora(8), LORA_RATES)
    for name, alpha, stabilized in (
        ("alpha / rank", 16.0, False),
        ("alpha / √rank", 2 * math.sqrt(8), True),
    ):
        arms = {r: lora(r, alpha=alpha, stabilized=stabilized) for r in lab.some(RANKS)}
        arms = dict(sorted((arms | {8: lora(8)}).items()))
        found = {rank: lab.runs(TASK, arm, rate) for rank, arm in arms.items()}
        rows += [[f"{name}, rank {rank}", f"{rate:g}", percent(r)] for rank, r in found.items()]
        figures[name] = {str(rank): as_dicts(runs) for rank, runs in found.items()}
        _draw(right, name, found)
    right.set(xscale="log", xlabel=f"rank, at rate {rate:g}", ylabel="held out (%)")
    right.set_xticks([4, 8, 64], ["4", "8", "64"], minor=False)
    right.xaxis.set_minor_formatter("")
    left.legend()
    right.legend()
    return Report(("trained", "rate", "held out (%)"), rows, figures, picture)


def _draw(axes, name, found):
    means = [mean_and_error([100 * run.held_out for run in runs]) for runs in found.values()]
    axes.errorbar(list(found), *zip(*means, strict=True), marker="o", capsize=3, label=name)
