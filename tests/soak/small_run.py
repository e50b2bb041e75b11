"""The training loop of `examples/language_model.py` with a small random model, for the soak.

    python tests/soak/small_run.py FOLDER [--mesh 4x2] [--distributed]

goes on from what is in the folder, and writes losses and adapters there when it is done.
"""

import argparse
from pathlib import Path

import jax
import language_model
import meshes
import numpy as np
import smollm
import tokenizers
from answers import Answers
from jax.experimental import multihost_utils

import jaxlora

TINY = smollm.LanguageModel(layers=2, width=24, heads=6, groups=2, hidden=24, vocabulary=32)


def options(out: Path, **changed: object) -> argparse.Namespace:
    """Return options of a run in a folder, which goes on if there is something to go on from."""
    kept = {"steps": 24, "batch": 4, "accumulate": 1, "rank": 2, "rate": 1e-2, "dropout": 0.1}
    kept |= {
        "task": "none",
        "seed": 0,
        "held_out": 0,
        "layers": 2,
        "qlora": False,
        "mesh": None,
        "save_every": 3,
    }
    kept |= {"out": out, "resume": True}
    return argparse.Namespace(**kept | changed)


def model_and_rows(mesh: meshes.Mesh = None) -> tuple[language_model.Model, Answers]:
    """Return a small random model, and rows of two lengths."""
    params = meshes.placed(TINY.init(jax.random.key(0), np.zeros((1, 8), np.int32)), mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocabulary, (50, 16)).astype(np.int32)
    lengths = rng.choice([6, 16], 50)
    place = np.arange(16)[None]
    unused = tokenizers.Tokenizer(tokenizers.models.BPE())
    answers = Answers(tokens, (place >= 3) & (place < lengths[:, None]))
    return language_model.Model(TINY, params, unused), answers


def main() -> None:
    """Run or go on, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mesh")
    parser.add_argument("--distributed", action="store_true")
    given = parser.parse_args()
    if given.distributed:
        jax.distributed.initialize()
    chosen = options(given.folder, mesh=meshes.made(given.mesh))
    model, rows = model_and_rows(chosen.mesh)
    fn = jaxlora.lora(TINY.apply, strict=True)
    _, adapters, losses = language_model.train(chosen, model, fn, rows)
    leaves = [multihost_utils.process_allgather(x, tiled=True) for x in jax.tree.leaves(adapters)]
    if jax.process_index() == 0:
        np.savez(given.folder / "new.npz", losses, *leaves)
        (given.folder / "new.npz").replace(given.folder / "result.npz")  # whole, if it is there


if __name__ == "__main__":
    main()
