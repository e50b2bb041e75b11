"""Draw what adapters of two ranks have learned of movie reviews, with `jaxlora.analysis.plot`.

all-MiniLM-L6-v2 is trained with adapters on query and value of every layer, of rank 4 and of rank
16. Writes a picture of each kind; those in the guide on analysis are from
``--out docs/_static``.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bert
import fetch
import from_peft
import jax
import matplotlib as mpl
import reviews
from matplotlib.axes import Axes

import jaxlora
from jaxlora import analysis
from jaxlora.analysis import plot

RANKS = (4, 16)
WEIGHT = "params/layer_5/value/kernel"  # whose directions are compared


def adapters(rank: int, base: Any, example: reviews.Sentences) -> dict[str, Any]:
    """Return fresh adapters of a rank, each with a draw of its own."""
    config = jaxlora.LoRAConfig(rank=rank, alpha=2 * rank, targets=("query", "value"))
    apply, inputs = bert.SentenceEncoder().apply, (example.tokens, example.mask)
    adapted = jaxlora.init(jax.random.key(rank), apply, base, *inputs, config=config)
    return jaxlora.split(adapted)[1]


def train(options: argparse.Namespace) -> tuple[Any, list[tuple[dict[str, Any], list[float]]]]:
    """Return the base, and the adapters and losses of each rank."""
    weights, tokenizer = fetch.minilm()
    base = {"params": bert.encoder_params(weights)}
    sentences, _ = reviews.read_sentences(tokenizer, seed=0)
    fresh = [adapters(rank, base, sentences.take(slice(1))) for rank in RANKS]
    return base, [from_peft.train(base, each, sentences, options) for each in fresh]


def draw(base: Any, runs: list[tuple[dict[str, Any], list[float]]]) -> Iterator[tuple[str, Axes]]:
    """Yield each picture by name."""
    (small, _), (large, _) = runs
    spectra = analysis.spectrum(large, base)
    yield "spectra", plot.spectra(spectra)
    yield "energy", plot.energy(spectra)
    yield "similarity", plot.similarity(analysis.similarity(small, large)[WEIGHT])
    losses = {f"rank {rank}": run for rank, (_, run) in zip(RANKS, runs, strict=True)}
    yield "training", plot.training(losses)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pictures"), help="default %(default)s"
    )
    parser.add_argument("--steps", type=int, default=200, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "jaxlora"  # so that equal pictures are equal files

    for name, ax in draw(*train(options)):
        path, figure = options.out / f"analysis_{name}.svg", ax.figure
        figure.savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
