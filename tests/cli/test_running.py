"""The command line as a user runs it: its processes, exit codes, help, and what a disk does."""

import importlib.metadata
import json
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from command_line import (
    GOLDEN,
    PARAMS,
    ROOT,
    adapters,
    command,
    hub,
    refused,
    run,
    saved,
    told,
    written,
)
from full_disk import LIMITED

import jaxlora
from jaxlora.cli.application import COMMANDS

pytestmark = pytest.mark.once
NAMES = [each.__name__ for each in COMMANDS]


def test_help_of_every_command_has_an_example_of_it():
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in NAMES)
    assert "Exit codes: 0 done; 1" in out
    for name in NAMES:
        code, out, _ = run(name, "--help")
        assert code == 0
        assert f"Example: jaxlora {name}" in out
        assert "--json" in out


def test_entry_point_and_module_are_the_same():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["jaxlora"]
    entry = importlib.metadata.EntryPoint("jaxlora", script, "console_scripts")
    assert entry.load() is jaxlora.cli.main
    done = subprocess.run(
        [sys.executable, "-m", "jaxlora", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, jaxlora.__version__)


def test_library_imports_no_part_of_the_command_line():
    code = "import sys, jaxlora; assert not {'typer', 'rich', 'jaxlora.cli'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_one_line_tells_how_to_get_it(tmp_path):
    before = "import sys; sys.modules['typer'] = None"
    done = command("--help", folder=tmp_path, before=before)
    wanted = "jaxlora: the command line needs typer: install jaxlora[cli]\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


def test_a_process_ends_with_its_exit_code_and_no_traceback(tmp_path):
    saved(tmp_path / "run", adapters())
    saved(tmp_path / "other", adapters(1))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/adapter_config.json").write_text("{")
    wanted = {
        ("inspect", "run"): 0,
        ("diff", "run", "other"): 1,
        ("inspect", "nowhere"): 2,
        ("inspect", "foreign"): 2,
        ("inspect", "broken"): 2,
        ("inspect",): 2,
        ("no_such_command",): 2,
        ("merge", "nowhere", "run", "out"): 2,
    }
    for words, code in wanted.items():
        done = command(*words, folder=tmp_path)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert bool(done.stdout) == (code < 2)
        if code == 2 and len(words) > 1:
            assert done.stderr.startswith("jaxlora: error: ")
            assert done.stderr.count("\n") == 1
    assert {x.name for x in tmp_path.iterdir()} == {"run", "other", "foreign", "broken"}


def test_bad_folders_are_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("text")
    assert "there is no such folder" in refused("inspect", tmp_path / "nowhere")
    assert "jaxlora.save_adapters or PEFT wrote" in refused("inspect", tmp_path / "file")
    run_ = saved(tmp_path / "run", adapters())
    written(tmp_path / "base", PARAMS)
    assert "checkpoint of something else" in refused("inspect", tmp_path / "base")
    mark = run_ / "_CHECKPOINT_METADATA"
    mark.write_text(mark.read_text().replace('"rank": 4', '"rank": 3', 1))
    assert "checksum" in refused("inspect", run_)
    mark.write_text("no JSON")
    assert "is damaged" in refused("diff", run_, run_)
    peft = tmp_path / "peft"
    peft.mkdir()
    config = json.loads((GOLDEN / "lora/adapter_config.json").read_text())
    (peft / "adapter_config.json").write_text(json.dumps(config | {"use_bdlora": True}))
    assert "BD-LoRA" in refused("inspect", peft)
    (peft / "adapter_config.json").write_text(json.dumps(config))
    assert "there is no file" in refused("inspect", peft)
    (peft / "adapter_model.bin").write_bytes(b"pickle")
    assert "is a pickle" in refused("inspect", peft)


def test_disk_that_is_full_leaves_nothing_half_written(tmp_path):
    pytest.importorskip("resource", reason="limits of file sizes are of POSIX")
    saved(tmp_path / "run", adapters())
    told("convert", tmp_path / "run", tmp_path / "peft")
    written(tmp_path / "base", PARAMS)
    hub(tmp_path / "hub", np.float32)
    before = {x.name for x in tmp_path.iterdir()}
    for words in (
        ("convert", "run", "out"),
        ("convert", "peft", "out"),
        ("combine", "run", "run", "out"),
        ("truncate", "run", "out", "--rank", "2"),
        ("merge", "base", "run", "out"),
        ("merge", "hub", GOLDEN / "lora", "out"),
        ("merge", "hub", GOLDEN / "lora", "out", "--json"),
    ):
        done = command(*words, folder=tmp_path, before=LIMITED.format(100))
        errors = [line for line in done.stderr.splitlines() if "warning" not in line]
        assert (done.returncode, done.stdout, len(errors)) == (2, "", 1), (words, done.stderr)
        assert f"cannot save to {tmp_path / 'out'}: " in errors[0]
        assert "File too large" in errors[0]
        assert "what was saved there before is as it was" in errors[0]
        assert {x.name for x in tmp_path.iterdir()} == before
    done = command("convert", "run", "peft", folder=tmp_path, before=LIMITED.format(100))
    assert done.returncode == 2
    assert not told("diff", tmp_path / "run", tmp_path / "peft")["differs"]


def test_reader_of_the_output_may_leave(tmp_path):
    saved(tmp_path / "run", adapters())
    before = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    done = command("inspect", "run", folder=tmp_path, before=before)
    assert (done.returncode, done.stderr) == (1, "")


def test_bench_reports_the_ratio_of_two_medians():
    code, out, err = run("bench", "--json", "--rounds", "3")
    report = json.loads(out)
    assert err == ""
    assert code == (0 if report["near_floor"] else 1)
    assert report["near_floor"] == (report["ratio"] <= report["expected_below"])
    assert (report["rounds"], report["platform"]) == (3, "cpu")
    assert report["ratio"] == pytest.approx(report["adapted_s"] / report["frozen_s"], rel=0.9)
    code, out, _ = run("bench", "--rounds", "3")
    assert "times the frozen model" in out
