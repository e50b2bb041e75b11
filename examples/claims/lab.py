"""Runs by name: each is made once, and its result is kept in a folder."""

import contextlib
import dataclasses
import fcntl
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlora

from .arms import Arm, Trainable
from .definitions import definitions
from .pictures import fashion
from .sentences import glosses, sentiment
from .tasks import Task
from .training import Run, Trainer

KEPT = 25_000_000  # parameters: what a run has trained is kept if it is no more, to spare the disk
TASKS = {make.__name__: make for make in (sentiment, glosses, definitions, fashion)}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Runs that a claim needs: one for each seed, at the best of some rates.

    Attributes:
        task: its name.
        arm: what is trained.
        rates: to choose from, at the first seed, by the validation score.
        chosen_by: the arm whose runs choose the rate; None for this one.
        seeds: how many of the seeds; None for all.
    """

    task: str
    arm: Arm
    rates: Sequence[float]
    chosen_by: Arm | None = None
    seeds: int | None = None


class Lab:
    """What the claims are tried with.

    Args:
        folder: where the result of each run is kept; a run that is there is not made again.
            Several processes may share it: one waits for a run that another makes.
        seeds: of the runs of each arm.
        quick: make tasks of few steps and small models, to see that all works.
    """

    def __init__(self, folder: Path, seeds: Sequence[int] = (0, 1, 2), *, quick: bool = False):
        self.folder, self.seeds, self.quick = folder, tuple(seeds), quick
        self._tasks: dict[str, Task] = {}
        self._trainers: dict[Any, Trainer] = {}

    def task(self, name: str) -> Task:
        """Return a task."""
        if name not in self._tasks:
            self._tasks[name] = TASKS[name](self.quick)
        return self._tasks[name]

    def run(self, task: str, arm: Arm, rate: float, seed: int) -> Run:
        """Return a run's figures, from the folder if they are there."""
        path = self._place(task, arm, rate, seed).with_suffix(".json")
        with _alone(path.with_suffix(".lock")):
            if path.exists():
                return Run(**json.loads(path.read_text()))
            found, trainable = self._train(task, arm, rate, seed)
            if found.trained <= KEPT:
                _save(path.with_suffix(""), trainable)
            _write(path, json.dumps(dataclasses.asdict(found), indent=2))
            return found

    def trainable(self, task: str, arm: Arm, rate: float, seed: int) -> Trainable:
        """Return what a run has trained, from the folder if it is there."""
        place = self._place(task, arm, rate, seed)
        leaves, adapters = place / "leaves.npz", place / "adapters"
        if not leaves.exists():
            _save(place, self._train(task, arm, rate, seed)[1])
        base = self.task(task).params
        loaded = jaxlora.load_adapters(adapters, base=base) if arm.rank else {}
        return Trainable(dict(np.load(leaves)), loaded)

    def best_rate(self, wanted: Wanted) -> float:
        """Return the rate with the best validation score, at the first seed."""
        arm, seed = wanted.chosen_by or wanted.arm, self.seeds[0]
        rates = self.some(wanted.rates)
        scores = [self.run(wanted.task, arm, rate, seed).validation for rate in rates]
        best = np.argmax(scores) if self.task(wanted.task).higher_is_better else np.argmin(scores)
        return rates[int(best)]

    def best_trainable(self, wanted: Wanted, *, seed: int) -> Trainable:
        """Return what the run of a seed at the best rate has trained."""
        return self.trainable(wanted.task, wanted.arm, self.best_rate(wanted), seed)

    def runs(self, wanted: Wanted) -> list[Run]:
        """Return the runs that are wanted, from the folder those that are there."""
        rate, seeds = self.best_rate(wanted), self.seeds[: wanted.seeds]
        return [self.run(wanted.task, wanted.arm, rate, seed) for seed in seeds]

    def some(self, choices: Sequence[Any]) -> Sequence[Any]:
        """Return what to try of a few choices: one, where all is to be quick."""
        return choices[:1] if self.quick else choices

    def _train(self, task: str, arm: Arm, rate: float, seed: int) -> tuple[Run, Trainable]:
        if (task, arm) not in self._trainers:
            self._trainers = {(task, arm): Trainer(self.task(task), arm)}  # one, for its memory
        return self._trainers[task, arm].run(rate, seed)

    def _place(self, task: str, arm: Arm, rate: float, seed: int) -> Path:
        name = re.sub(r"[^\w.]+", "-", f"{arm.name} rate {rate:g} seed {seed}")
        return self.folder / ("quick" if self.quick else "full") / task / name.replace(".", "_")


def _save(place: Path, found: Trainable) -> None:
    """Write what was trained into a folder; what is written last tells that it is whole."""
    place.mkdir(parents=True, exist_ok=True)
    if found.adapters:
        jaxlora.save_adapters(place / "adapters", found.adapters)
    new, leaves = place / "new.npz", jax.tree.map(np.asarray, found.leaves)
    np.savez(new, **leaves)
    new.replace(place / "leaves.npz")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is within the same lock; one that ends lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text + "\n")
    new.replace(path)
