"""What a training run keeps in its folder, so that one that was interrupted goes on bit-equal.

``adapters`` and ``head.npz`` are the result so far, for use; ``state`` holds all that the next step
depends on, with Orbax: what is trained, its running mean, the state of the optimizer and, as JSON,
the history, whose length is the step. The order of the data follows from the seed and the step.
"""

import argparse
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import orbax.checkpoint as ocp

import jaxlora

DECIDING = ("steps", "batch", "rank", "alpha", "learning_rate", "seed", "sentences")


class Trainable(NamedTuple):
    """What is trained: the factors, and the head that the pretrained model does not have."""

    adapters: dict[str, jaxlora.Adapter]
    head: Any


class State(NamedTuple):
    """What a step changes: what is trained, its running mean, and the optimizer's state."""

    trainable: Trainable
    mean: Trainable
    optimizer: Any


@dataclasses.dataclass
class History:
    """What has been measured.

    Attributes:
        options: the options that decide the result.
        baseline: held-out accuracy of the frozen model, on all sentences.
        losses: training loss of each step.
        held_out: pairs of a step and the accuracy on the first held-out sentences.
    """

    options: dict[str, Any]
    baseline: float
    losses: list[float] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class Folder:
    """The folder of a run.

    Args:
        path: made if there is none.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._states = ocp.CheckpointManager(
            (path / "state").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False),
        )

    def save(self, state: State, history: History) -> None:
        """Save the result so far and the state; an interruption leaves what was there."""
        step = len(history.losses)
        jaxlora.save_adapters(self.path / "adapters", state.mean.adapters)
        np.savez(self.path / "head.new.npz", **state.mean.head)
        (self.path / "head.new.npz").replace(self.path / "head.npz")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            history=ocp.args.JsonSave(dataclasses.asdict(history)),
        )
        for other in self._states.all_steps():
            if other >= step:  # of an earlier run, which Orbax would take for newer
                self._states.delete(other)
        self._states.save(step, args=items, force=True)

    def history(self, options: argparse.Namespace) -> History:
        """Return the history of the run, which must have had the same options."""
        if self._states.latest_step() is None:
            raise SystemExit(f"nothing to resume in {self.path}: run without --resume first")
        items = ocp.args.Composite(history=ocp.args.JsonRestore())
        history = History(**self._states.restore(None, args=items).history)
        check_same(history.options, deciding(options), self.path)
        return history

    def state(self, like: State) -> State:
        """Return the last state that was saved, placed as another."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like._asdict()))
        return State(**self._states.restore(None, args=items).state)


def deciding(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the result."""
    return {name: getattr(options, name) for name in DECIDING}


@contextlib.contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set, for a loop that saves and ends where it can.

    Raised while Orbax writes, an exception can be lost. Of several processes, SIGTERM belongs to
    JAX, which tells all of them.
    """
    asked = threading.Event()
    signals = [signal.SIGINT] + [signal.SIGTERM] * (jax.process_count() == 1)
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_same(kept: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    """End the program if a run goes on with other options than it began with.

    Args:
        kept: the options that decide the result, as the run began.
        given: the same now.
        folder: of the run.
    """
    if differing := [
        f"--{name.replace('_', '-')} is {value}, was {kept[name]}"
        for name, value in given.items()
        if value != kept[name]
    ]:
        raise SystemExit(
            f"the run in {folder} had other options ({', '.join(differing)}): "
            "resume with the same, or start another run with --out"
        )


def draw(history: History, watched: int, on_all: str, path: Path) -> None:
    """Draw the loss of every step, and the held-out accuracy beside the frozen baseline.

    Args:
        history: what was measured.
        watched: number of held-out sentences that the accuracies are of.
        on_all: the result on all of them, in words.
        path: of the picture.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    losses, window = history.losses, min(20, len(history.losses))
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.25, label="each step")
    left.plot(range(window, len(losses) + 1), mean, color="C0", label=f"mean of {window}")
    left.set(xlabel="step", ylabel="training loss (nats)", title="training")
    steps, accuracies = zip(*history.held_out, strict=True)
    right.plot(steps, 100 * np.array(accuracies), "o-", color="C1", label="LoRA")
    frozen = 100 * accuracies[0]
    right.axhline(frozen, color="0.4", linestyle="--", label="frozen model, logistic regression")
    title = f"{watched:,} of the held-out sentences\n(on {on_all})"
    right.set(xlabel="step", ylabel="held-out accuracy (%)", title=title)
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
