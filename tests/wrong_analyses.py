"""Calls of `jaxlora.analysis` in which everything wrong may stand; see wrong_calls.py."""

from wrong_calls import ADAPTED, ADAPTERS, PARAMS

from jaxlora import analysis
from jaxlora.analysis import plot

FOUND = analysis.spectrum(ADAPTERS)
INTRUDERS = ({"base": PARAMS, "adapters": ADAPTERS}, {"k": 2, "epsilon": 0.5})
CALLS = {
    "spectrum": (analysis.spectrum, {"looked at": ADAPTERS}, {"base": PARAMS}),
    "spectrum of a tree": (analysis.spectrum, {"a tree": ADAPTED}, {}),
    "similarity": (
        analysis.similarity,
        {"first": ADAPTERS, "second": ADAPTERS},
        {"side": "in", "of": "product"},
    ),
    "amplification": (analysis.amplification, {"base": PARAMS, "adapters": ADAPTERS}, {}),
    "intruders": (analysis.intruders, *INTRUDERS),
    "without_intruders": (analysis.without_intruders, *INTRUDERS),
    "explained": (
        analysis.explained,
        {"weight": PARAMS, "ranks": (1,)},
        {"base": None, "sites": None},
    ),
    "plot.spectra": (plot.spectra, {"found": FOUND}, {"ax": None}),
    "plot.energy": (plot.energy, {"found": FOUND}, {"ax": None}),
    "plot.similarity": (plot.similarity, {"phi": FOUND["up"].values[None]}, {"ax": None}),
    "plot.training": (plot.training, {"losses": {"run": [1.0]}}, {"ax": None}),
}
FITTING = {
    "looked at": {"adapters", "adapted params"},
    "spectrum.base": {"None", "params"},
    "a tree": {"adapters", "adapted params", "an adapted weight"},
    "first": {"adapters", "adapted params"},
    "second": {"adapters", "adapted params", "params"},
    "k": {"an int"},
    "epsilon": set(),
    "weight": {"params", "an array", "a tuple of arrays", "an NNX module"},
    "explained.base": {"None", "params"},
    "ax": {"None"},
    "phi": {"an array"},
    "plot.training.losses": set(),
}
