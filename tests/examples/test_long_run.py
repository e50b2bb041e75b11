"""Checkpoints of a long run: what they hold, what stops it, and what is left behind."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import language_model
import long_run
import numpy as np
import optax
import pytest
from full_disk import LIMITED
from soak import killed, small_run

import jaxlora

pytestmark = [pytest.mark.once, pytest.mark.xdist_group("long_run")]

WITHOUT_RIGHTS = (  # runs Python as a user whom a read-only folder stops, even root
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); "  # PR_CAPBSET_DROP
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def take(chosen):
    return chosen


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


class TestData:
    def test_each_row_is_in_an_epoch_once_and_epochs_differ(self):
        data = long_run.batches(12, 4, 0, take)
        epochs = [np.concatenate([next(data) for _ in range(3)]) for _ in range(2)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(12))
        assert (epochs[0] != epochs[1]).any()
        equal(next(long_run.batches(12, 4, 0, take)), epochs[0][:4])
        assert (next(long_run.batches(12, 4, 1, take)) != epochs[0][:4]).any()

    def test_goes_on_where_it_was(self):
        data = long_run.batches(10, 4, 3, take)
        for _ in range(4):
            next(data)
        place, rest = json.loads(json.dumps(data.get_state())), [next(data) for _ in range(5)]
        other = long_run.batches(10, 4, 3, take)
        other.set_state(place)
        equal([next(other) for _ in range(5)], rest)


class TestCheckpoints:
    def state(self, value):
        return {"adapters": {"a": jnp.full(3, value)}, "step": jnp.int32(value)}

    def test_hold_state_data_and_history_of_the_last_step(self, tmp_path):
        checkpoints = long_run.Checkpoints(tmp_path / "run", every=2)
        data, history = long_run.batches(9, 2, 0, take), {"losses": []}
        for step in range(1, 6):
            next(data)
            history["losses"].append(float(step))
            checkpoints.save(step, self.state(step), data, history)
        checkpoints.close()
        again = long_run.Checkpoints(tmp_path / "run", every=2)
        assert again.latest() == 4
        assert again.history() == {"losses": [1.0, 2.0, 3.0, 4.0]}
        other = long_run.batches(9, 2, 0, take)
        equal(again.restore(self.state(0), other), self.state(4))
        fifth = long_run.batches(9, 2, 0, take)
        for _ in range(4):
            next(fifth)
        equal(next(other), next(fifth))
        again.close()

    def test_are_written_between_when_forced_and_only_the_last_are_kept(self, tmp_path):
        checkpoints = long_run.Checkpoints(tmp_path, every=2, keep=2)
        data = long_run.batches(9, 2, 0, take)
        for step in (2, 4, 6):
            checkpoints.save(step, self.state(step), data, {})
        for _ in range(2):  # the second time it is there
            checkpoints.save(7, self.state(7), data, {}, force=True)
        checkpoints.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]

    def test_folder_that_cannot_be_written_is_an_error_at_once(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"cannot write checkpoints to .*/file/run: .*Not a dir"):
            long_run.Checkpoints(tmp_path / "file" / "run", every=1)
        (tmp_path / "kept").mkdir(mode=0o555)
        code = "import pathlib, sys, long_run; long_run.Checkpoints(pathlib.Path(sys.argv[1]), 1)"
        command = [sys.executable, "-c", WITHOUT_RIGHTS, "-c", code, tmp_path / "kept"]
        done = subprocess.run(
            command, env=killed.environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert f"cannot write checkpoints to {tmp_path}/kept: [Errno 13] Permission" in done.stderr

    def test_half_written_ones_are_not_taken_for_whole(self, tmp_path):
        checkpoints = long_run.Checkpoints(tmp_path, every=1)
        data = long_run.batches(9, 2, 0, take)
        checkpoints.save(1, self.state(1), data, {})
        checkpoints.close()
        half = tmp_path / "2.orbax-checkpoint-tmp-0"
        (half / "state").mkdir(parents=True)
        (half / "state" / "manifest.ocdbt").write_bytes(b"half")
        again = long_run.Checkpoints(tmp_path, every=1)
        assert again.latest() == 1
        equal(again.restore(self.state(0), data), self.state(1))
        again.close()


def test_a_gradient_that_is_not_finite_changes_nothing_also_in_a_sum(tmp_path):
    params = {"a": jnp.ones(3)}
    for accumulate in (1, 2):
        tx = language_model.optimizer(small_run.options(tmp_path, accumulate=accumulate))
        fine, bad = {"a": jnp.full(3, 0.5)}, {"a": jnp.array([1.0, jnp.nan, 1.0])}

        def moved(grads, tx=tx) -> Any:
            state, found = tx.init(params), params
            with jax.numpy_dtype_promotion("standard"):
                for grad in grads:
                    updates, state = tx.update(grad, state, found)
                    found = optax.apply_updates(found, updates)
            return found

        equal(moved([fine, bad, fine, fine, fine]), moved([fine, fine, fine, fine]))
        assert (moved([fine] * 4)["a"] != 1).all()


def test_a_restored_state_compiles_no_step_again(tmp_path):
    chosen = small_run.options(tmp_path, dropout=0.0)
    model, rows = small_run.model_and_rows()
    tx = language_model.optimizer(chosen)
    with jax.numpy_dtype_promotion("standard"):
        base, state = language_model.start(chosen, model, tx)
        fn = jaxlora.lora(model.module.apply, strict=True)
        step = language_model.training_step(chosen, fn, tx)
        data = long_run.batches(
            50, 4, 0, lambda rows_: language_model.answers.cut(rows.take(rows_))
        )
        batch = language_model.meshes.spread(rows.take(slice(4)), None)
        for _ in range(2):
            state, _ = step(state, base, batch)
        assert step._cache_size() == 1
        checkpoints = long_run.Checkpoints(tmp_path / "run", every=1)
        checkpoints.save(2, state, data, {})
        expected, _ = step(state, base, batch)
        fresh = language_model.start(chosen, model, tx)[1]
        restored = checkpoints.restore(fresh, data)
        checkpoints.close()
        equal(step(restored, base, batch)[0].adapters, expected.adapters)
        assert step._cache_size() == 1


def run(folder, *, before="", **environment):
    """Run the small training in a process of its own."""
    code = f"{before}\nimport sys, runpy\nsys.argv = ['small_run', {str(folder)!r}]\n"
    code += f"runpy.run_path({str(killed.PROGRAM)!r}, run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=killed.environment(folder) | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_runs_that_are_killed_end_as_if_they_had_not_been(tmp_path):
    assert len(killed.soak(tmp_path, kills=5, seed=1)) == 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    killed.finished(killed.started(folder))
    return folder


def begun(folder):
    """Start a run, and return it when it has saved a checkpoint."""
    program = killed.started(folder)
    killed.until_saved(folder, program)
    return program


def same_when_resumed(folder, whole):
    killed.finished(killed.started(folder))
    killed.compare(folder / "result.npz", whole / "result.npz")


def test_a_run_killed_before_its_first_checkpoint_begins_again(whole):
    folder = whole.parent / "early"
    (folder / "checkpoints" / "3.orbax-checkpoint-tmp-0").mkdir(parents=True)
    program = killed.started(folder)
    output, errors = program.communicate()
    assert program.returncode == 0, errors
    assert f"no checkpoint in {folder} yet: begins at the first step" in output
    killed.compare(folder / "result.npz", whole / "result.npz")


def test_sigterm_saves_and_ends(whole):
    folder = whole.parent / "asked"
    program = begun(folder)
    program.send_signal(signal.SIGTERM)
    output, errors = program.communicate()
    step = killed.checkpoint(folder)
    assert program.returncode == 143, errors
    assert f"stopped at step {step}, which is saved in {folder}, for --resume" in output
    same_when_resumed(folder, whole)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="limits of file sizes are of POSIX")
def test_a_full_disk_is_an_error_that_says_so_and_leaves_the_last_checkpoint(whole):
    folder = whole.parent / "full"
    program = begun(folder)
    program.kill()
    program.communicate()
    step = killed.checkpoint(folder)
    full = run(folder, before=LIMITED.format(600))
    assert full.returncode == 1
    assert f"cannot write a checkpoint to {folder / 'checkpoints'}: " in full.stderr
    assert "File too large" in full.stderr
    assert f"the last one that is whole is of step {step}" in full.stderr
    assert killed.checkpoint(folder) == step
    same_when_resumed(folder, whole)
