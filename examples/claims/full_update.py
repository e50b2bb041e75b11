"""Is what full fine-tuning changes of low rank: which rank explains it, and which is enough?

The hypothesis of Hu et al. 2021 (arXiv:2106.09685), section 1: that the change of the weights has a
low rank. Eckart and Young 1936 give the nearest matrix of a rank.
"""

import jax
import numpy as np

import jaxlora
from jaxlora import algebra, analysis

from .arms import FULL, together
from .lab import Lab, Wanted
from .rates import FULL_RATES, TASK
from .report import Report, figure, mean_and_error
from .tasks import path_of

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


def needs(lab: Lab) -> dict[str, Wanted]:
    """Return the runs of full fine-tuning."""
    return {"full": Wanted(TASK, FULL, FULL_RATES[1:])}


def run(lab: Lab) -> Report:
    """Take the change of each matrix of the layers to a rank; all else stays as it was tuned."""
    task = lab.task(TASK)
    rate = lab.best_rate(needs(lab)["full"])
    predict = jax.jit(jaxlora.lora(task.fn, strict=True))
    ranks = lab.some(RANKS)
    energy, scores, whole = [], [], []
    for seed in lab.seeds:
        tuned = together(FULL)(lab.trainable(TASK, FULL, rate, seed), task.params)
        whole.append(lab.run(TASK, FULL, rate, seed).held_out)
        energy.append(_energy(task.params, tuned, ranks))
        scores.append(
            [task.score(predict, _of_rank(task.params, tuned, r), "held out") for r in ranks]
        )
    energy, scores = np.array(energy), np.array(scores)
    rows = [
        [str(rank), f"{100 * energy[:, i].mean():.1f}", _told(scores[:, i])]
        for i, rank in enumerate(ranks)
    ]
    rows.append(["as it was tuned", "100", _told(whole)])
    picture, (left, right) = figure(2)
    left.plot(ranks, 100 * energy.mean(0), "o-")
    left.set(xscale="log", xlabel="rank", ylabel="of the squared norm of the change (%)")
    right.plot(ranks, 100 * scores.mean(0), "o-", label="changes of this rank")
    right.axhline(100 * np.mean(whole), color="0.4", linestyle="--", label="as it was tuned")
    right.set(xscale="log", xlabel="rank", ylabel="held out (%)")
    right.legend()
    figures = {"rate": rate, "ranks": ranks, "energy": energy.tolist(), "held_out": scores.tolist()}
    columns = ("rank of each change", "squared norm kept (%), mean", "held out (%)")
    return Report(columns, rows, figures | {"tuned": whole}, picture)


def _layers(params):
    return {"encoder": {k: v for k, v in params["encoder"].items() if k.startswith("layer_")}}


def _energy(params, tuned, ranks):
    """Return the share of the squared norm that each rank keeps, the mean of the matrices."""
    found = analysis.explained(_layers(tuned), ranks, base=_layers(params))
    return np.mean([each.energy for each in found.values()], axis=0)


def _of_rank(params, tuned, rank):
    """Return the tuned parameters, with changes of a rank in the matrices of the layers."""
    adapters = algebra.extract(_layers(params), _layers(tuned), rank).adapters
    before = dict(jax.tree.leaves_with_path(params))
    mixed = jax.tree.map_with_path(
        lambda path, leaf: before[path] if path_of(path) in adapters else leaf, tuned
    )
    return jaxlora.bind(mixed, adapters)


def _told(scores) -> str:
    mean, error = mean_and_error([100 * score for score in scores])
    return f"{mean:.1f}" if np.isnan(error) else f"{mean:.1f} ± {error:.1f}"
