"""One training run: the same optimizer and schedule for everything that can be trained."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import jaxlora

from .arms import COMPARED, Arm, Trainable, start, together
from .tasks import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run came to.

    Attributes:
        task: name of the task.
        arm: name of the arm.
        rate: the highest learning rate.
        seed: of the factors and the order of the data.
        steps: of training.
        trained: number of parameters that were trained.
        loss: training loss, mean of the last tenth of the steps.
        validation: score that the rate is chosen by.
        held_out: score on data that chose nothing.
        general: score on the other task, of the arms that are compared by it.
        bytes: that the compiled step needs at once: arguments, results and temporaries.
    """

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    trained: int
    loss: float
    validation: float
    held_out: float
    general: float | None
    bytes: int


class Trainer:
    """Trains one arm on a task, at any rate and seed, with programs that are compiled once."""

    def __init__(self, task: Task, arm: Arm):
        self._task, self._arm = task, arm
        self._step = jax.jit(_step(task, together(arm)), donate_argnums=1)
        self._predict = jax.jit(jaxlora.lora(task.fn, strict=True))
        self._compiled: dict[Any, Any] = {}  # steps, by the shape of their batch

    def run(self, rate: float, seed: int) -> tuple[Run, Trainable]:
        """Train; the rate rises for a tenth of the steps, and falls to zero on a cosine."""
        task, tenth = self._task, max(1, self._task.steps // 10)
        trainable, frozen = start(self._arm, task, seed)
        state = optax.scale_by_adam().init(trainable)
        rates = optax.warmup_cosine_decay_schedule(0.0, rate, tenth, task.steps)
        losses: list[float] = []
        about = f"{task.name}, {self._arm.name}, rate {rate:g}, seed {seed}"
        batches = itertools.islice(task.batches(seed), task.steps)
        for i, batch in enumerate(tqdm(batches, desc=about, total=task.steps, leave=False)):
            args = (trainable, state, frozen, batch, np.float32(rates(i + 1)))
            step = self._compiled_for(args)
            trainable, state, loss = step(*args)
            losses.append(float(loss))
        params = jax.jit(together(self._arm))(trainable, frozen)
        run = Run(
            task=task.name,
            arm=self._arm.name,
            rate=rate,
            seed=seed,
            steps=task.steps,
            trained=sum(leaf.size for leaf in jax.tree.leaves(trainable)),
            loss=float(np.mean(losses[-tenth:])),
            validation=task.score(self._predict, params, "validation"),
            held_out=task.score(self._predict, params, "held out"),
            general=task.general(params) if self._arm in COMPARED else None,
            bytes=max(map(_bytes, self._compiled.values())),
        )
        return run, trainable

    def prepared(self) -> Callable[[], Any]:
        """Return a function that makes a step, the first one again and again, and waits for it."""
        batch = next(self._task.batches(0))
        trainable, frozen = start(self._arm, self._task, 0)
        state = optax.scale_by_adam().init(trainable)
        args = (trainable, state, frozen, batch, np.float32(0))
        step = jax.jit(_step(self._task, together(self._arm))).lower(*args).compile()
        return lambda: jax.block_until_ready(step(*args))

    def _compiled_for(self, args: tuple[Any, ...]) -> Any:
        shape = str(jax.tree.map(np.shape, args[3]))
        if shape not in self._compiled:
            self._compiled[shape] = self._step.lower(*args).compile()
        return self._compiled[shape]


def seconds_of_steps(task: Task, arms: Sequence[Arm], rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each arm, all timed in turn, round by round."""
    steps = {arm.name: Trainer(task, arm).prepared() for arm in arms}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    return {name: float(np.median(found)) for name, found in seconds.items()}


def _step(task: Task, together: Callable[..., Any]) -> Any:
    """Return a step ``(trainable, state, frozen, batch, rate)`` of Adam."""
    apply = jaxlora.lora(task.fn, strict=True)

    def step(trainable, state, frozen, batch, rate):
        def loss(trainable):
            return task.loss(apply(together(trainable, frozen), *task.inputs(batch)), batch)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optax.scale_by_adam().update(grads, state)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return optax.apply_updates(trainable, updates), state, value

    return step


def _bytes(compiled: Any) -> int:
    """Return the bytes that a compiled step needs at once."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
