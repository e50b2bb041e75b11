"""What a run of days needs: data that knows its place, checkpoints, and a bar that tells its speed.

A checkpoint holds all that the next step depends on: what is trained, the optimizer's state, the
key of the random numbers, the place in the data, and the history, whose length is the step. It is
written by Orbax, in the background; one that was cut off by a crash is never taken for whole.
"""

import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm


def batches(
    rows: int, batch: int, seed: int, take: Callable[[np.ndarray], Any]
) -> grain.DatasetIterator:
    """Return batches without end, each row once in an epoch; its place can be saved and set.

    Args:
        rows: number of all rows.
        batch: rows of a batch.
        seed: decides the order, another one in each epoch.
        take: returns the rows of these numbers ``(batch,)``.
    """
    order = grain.MapDataset.range(rows).seed(seed).shuffle().repeat()
    return iter(order.batch(batch).map(take).to_iter_dataset())


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: made if there is none. Every process names the same one, on a shared file system.
        every: steps between two.
        keep: of the last ones.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        self.folder = folder.absolute()
        try:  # now, for Orbax would tell it after minutes
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(f"cannot write checkpoints to {self.folder}: {error}") from error
        when = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            save_decision_policy=when.AnySavePolicy(
                [when.FixedIntervalPolicy(every), when.PreemptionCheckpointingPolicy()]
            ),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Return the step of the last checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        data: grain.DatasetIterator,
        history: dict[str, Any],
        *,
        force: bool = False,
    ) -> None:
        """Begin to write a checkpoint, if it is time for one; return when the arrays are copied.

        Args:
            step: how many have been made.
            state: pytree of arrays.
            data: whose next batch is that of the next step, the same in every process.
            history: for JSON.
            force: whether or not it is time.

        Raises:
            OSError: the last one could not be written, which is known only now.
        """
        if force and self.latest() == step:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data.get_state()),
            history=ocp.args.JsonSave(copy.deepcopy(history)),  # it is written later
        )
        with self._telling():
            self._manager.save(step, args=items, force=force)

    def history(self) -> dict[str, Any]:
        """Return the history of the last checkpoint."""
        items = ocp.args.Composite(history=ocp.args.JsonRestore())
        return self._manager.restore(self.latest(), args=items).history

    def restore(self, like: Any, data: grain.DatasetIterator) -> Any:
        """Return the state of the last checkpoint, placed as another, and set the data to it."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like)),
            data=ocp.args.JsonRestore(),
        )
        found = self._manager.restore(self.latest(), args=items)
        data.set_state(found.data)
        return found.state

    def preempted(self, step: int) -> bool:
        """Tell, in all processes at the same step, whether one of them is to be shut down."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: the last one could not be written.
        """
        with self._telling():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until all is written, and end what writes in the background.

        Raises:
            OSError: the last one could not be written.
        """
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Say where it was that Orbax could not write, and what there is to go on from."""
        try:
            yield
        except Exception as error:  # of the file system, or of what Orbax writes with
            whole = f"the last one that is whole is of step {self.latest()}"
            raise OSError(
                f"cannot write a checkpoint to {self.folder}: {error}; {whole}"
            ) from error


class Progress(tqdm):
    """A bar with the loss, tokens a second and the time left, shown by the first process."""

    def __init__(self, steps: int, done: int):
        hidden = jax.process_index() != 0
        super().__init__(total=steps, initial=done, desc="training", unit="step", disable=hidden)
        self._begun, self._tokens = time.perf_counter(), 0

    def tell(self, losses: list[float], tokens: int) -> None:
        """Show a step of so many tokens."""
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._begun)
        self.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}", tokens_per_s=f"{rate:.0f}")
        self.update()

    def say(self, text: str) -> None:
        """Print a line above the bar, once for all processes."""
        if not self.disable:
            self.write(text)
