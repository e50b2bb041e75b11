"""Every script, run as a user runs it, and what the README says of them."""

import importlib.util
import itertools
import json
import re
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import bert
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pages
import pytest
import reviews
import run as benchmark_run
import runs
import sentiment
from tokenizers import Tokenizer

import jaxlora

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent

needs_weights = pytest.mark.skipif(
    not fetch.has("model.safetensors", "tokenizer.json", fetch.RATINGS),
    reason="the weights and sentences are not in the cache: run examples/sentiment.py once",
)


def run(*command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(text):
    return np.array([float(number) for number in re.findall(r"\d+\.\d+", text)])


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_readme_installs_from_the_clone_with_extras_that_exist():
    readme = (ROOT / "README.md").read_text()
    installed = re.findall(r"pip install (?:-\S+ )*'?([^'\s]+)", readme)
    assert installed == [".", ".[examples]", ".[test]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"'\.\[(\w+)\]'", readme))
    assert {"examples", "export", "quantized", "test"} <= extras
    assert extras <= set(project["optional-dependencies"])


SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("examples", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]
has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("peft")
needs_torch = pytest.mark.skipif(not has_torch, reason="it imports torch and peft")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=str(script), marks=needs_torch if "torch" in script.name else ())
        for script in SCRIPTS
    ],
)
def test_scripts_print_help_and_do_nothing_else(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert out.startswith(f"usage: {script.name}")
    assert out.count("usage:") == 1


def test_benchmarks_are_listed_with_a_line_each():
    out = run("benchmarks/run.py", "--help")
    listed = re.findall(r"^  (\w+) +(\S.*)$", out.partition("benchmarks:\n")[2], re.MULTILINE)
    assert dict(listed) == {name: found.about for name, found in benchmark_run.BENCHMARKS.items()}


@pytest.mark.parametrize(
    ("command", "listed"),
    [
        ("benchmarks/run.py train_step nothing", "train_step_forms"),
        ("benchmarks/train_step.py --variants lora nothing", "weight-side"),
        ("benchmarks/memory.py --targets nothing", "down"),
        ("benchmarks/llama.py --kinds nothing", "nf4"),
        ("examples/family.py --variants LoRA nothing", "rsLoRA"),
        ("benchmarks/plot.py nothing", "run.py"),
        ("examples/sentiment.py --steps 0", "must be 1 or more"),
    ],
)
def test_unknown_names_are_errors_that_list_what_there_is(command, listed, monkeypatch, capsys):
    script, *options = command.split()
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, message = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert "--steps" in message or "nothing" in message
    assert listed in message.partition("error:")[2]


def shown_in_gallery(script):
    """Return the output of a script that the gallery shows."""
    blocks = list(pages.read_blocks((ROOT / "docs" / "gallery.md").read_text()))
    (shown,) = (
        after.content
        for command, after in itertools.pairwise(blocks)
        if command.content == f".venv/bin/python {script}"
    )
    return shown


def test_digits_keeps_the_base_and_mends_the_worst_digit():
    out = run("examples/digits.py")
    before, after = (float(x) for x in re.findall(r"([\d.]+)% on (?:its worst|\d)", out))
    assert after > before + 5
    assert "base bit-identical: True" in out
    (old,) = re.findall(r"pretrained: ([\d.]+)%", out)
    assert f"without the adapters: {old}%" in out
    assert pages.agree(shown_in_gallery("examples/digits.py"), out.rstrip())


def test_both_ways_to_train_agree():
    out = run("examples/two_ways.py")
    before, one, two, gap = numbers(out)[:4]
    assert one < before / 2
    assert one == two
    assert gap < 10
    loss, _ = shown_in_gallery("examples/two_ways.py").splitlines()
    assert pages.agree(loss, out.splitlines()[0])


def test_benchmarks_on_a_gpu_say_that_they_need_one(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # where nvidia-smi would be
    monkeypatch.setattr(sys, "argv", ["run.py", "train_step", "gpu"])
    with pytest.raises(SystemExit):
        benchmark_run.main()
    assert "['gpu'] need a GPU" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert set(benchmark_run.BENCHMARKS) - set(benchmark_run.parse().names) == {"gpu", "gpu_torch"}


@pytest.mark.parametrize("model", ["transformer", "llama"])
def test_benchmark_measures_every_variant(model, tmp_path):
    small = ["--layers=1", "--width=16", "--hidden=32", "--heads=2", "--batch=2", "--time=8"]
    small += ["--model", model]
    file = tmp_path / "step.json"
    run("benchmarks/train_step.py", *small, "--rank=2", "--rounds=2", "--out", file)
    variants = json.loads(file.read_text())["results"]
    assert set(variants) == {"floor", "full", "per call", "naive", "nnx.LoRA", "qwix", "lora"}
    assert variants["floor"]["over_floor"] == 1
    assert variants["floor"]["gflops"] < variants["lora"]["gflops"]


@needs_weights
def test_encoder_gives_the_published_similarities():
    weights, tokenizer = fetch.minilm()
    encode = Tokenizer.from_file(str(tokenizer)).encode_batch(
        [
            "The weather is lovely today.",
            "It's so sunny outside!",
            "He drove to the stadium.",
        ]
    )
    tokens = jnp.array([e.ids for e in encode], jnp.int32)
    mask = jnp.array([e.attention_mask for e in encode], bool)
    params = {"params": bert.encoder_params(weights)}
    vectors = np.asarray(bert.SentenceEncoder().apply(params, tokens, mask))
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarities = (vectors @ vectors.T)[np.triu_indices(3, 1)]
    # the quick-start example of sentence-transformers
    np.testing.assert_allclose(similarities, [0.6660, 0.1046, 0.1411], atol=1e-4)


@needs_weights
def test_sentiment_trains_saves_and_restores(tmp_path):
    out = run("examples/sentiment.py", "--sentences=300", "--steps=4", "--out", tmp_path)
    assert "same prediction for 100.00%" in out
    assert "trainable 73,728 of 22,639,489 parameters (0.33%)" in out
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def train(monkeypatch):
    """Return a function that trains with options of the command and returns the history."""
    params, tokenizer = sentiment.load_pretrained()
    sentences, held_out = reviews.read_sentences(tokenizer, 1, 40)

    def train(*command):
        options = ("--sentences=40", "--steps=20", "--batch=4", "--eval-every=5")
        monkeypatch.setattr(sys, "argv", ["sentiment.py", *options, *map(str, command)])
        options = sentiment.parse()
        folder = runs.Folder(options.out)
        history = runs.History(runs.deciding(options), 0.5)
        history = folder.history(options) if options.resume else history
        with jax.numpy_dtype_promotion("standard"):  # optax's schedule divides integers
            sentiment.train(options, params, sentences, held_out, history, folder)
        return history

    return train


def saved(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / "state" / "20" / "state")
    return jax.tree.leaves((state, dict(np.load(folder / "head.npz"))))


@needs_weights
def test_sentiment_resumed_is_bit_equal_to_never_stopped(tmp_path, train):
    straight = train("--out", tmp_path / "straight")
    with pytest.raises(SystemExit, match="0"):
        train("--stop-at=10", "--out", tmp_path / "stopped")
    resumed = train("--resume", "--out", tmp_path / "stopped")
    assert len(straight.losses) == 20
    assert resumed.losses == straight.losses
    assert list(map(tuple, resumed.held_out)) == straight.held_out
    pairs = zip(saved(tmp_path / "stopped"), saved(tmp_path / "straight"), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@needs_weights
def test_sentiment_resumes_only_the_same_run(tmp_path, train):
    with pytest.raises(SystemExit, match=r"nothing to resume in .*: run without --resume first"):
        train("--resume", "--out", tmp_path)
    with pytest.raises(SystemExit, match="0"):
        train("--stop-at=2", "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"--rank is 4, was 8\).* resume with the same"):
        train("--resume", "--rank=4", "--out", tmp_path)
    with pytest.raises(SystemExit, match="0"):  # another run in the place of a later state
        train("--stop-at=1", "--rank=4", "--out", tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["1"]


@needs_weights
def test_family_trains_what_each_variant_trains(tmp_path):
    names = ("DoRA", "LoRA-FA", "QLoRA + LoftQ", "full fine-tuning")
    out = tmp_path / "family.json"
    options = ("--sentences=60", "--steps=2", "--rates", "1e-3")
    run("examples/family.py", *options, "--out", out, "--variants", *names)
    found = json.loads(out.read_text())["results"]
    trained = {name: at["0.001"]["parameters"] for name, at in found.items()}
    head, pairs = 384 + 1, 6 * 2  # query and value of six layers
    assert trained["LoRA-FA"] == head + pairs * 8 * 384
    assert trained["QLoRA + LoftQ"] == head + pairs * 2 * 8 * 384
    assert trained["DoRA"] == head + pairs * (2 * 8 * 384 + 384)
    assert trained["full fine-tuning"] > 22_000_000


@needs_weights
def test_sentiment_interrupted_leaves_its_last_checkpoint(tmp_path):
    command = [sys.executable, "examples/sentiment.py", "--sentences=100", "--save-every=2"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "head.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the last checkpoint is in" in out
    base = {"params": {"encoder": bert.encoder_params(fetch.minilm()[0])}}
    adapters = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    assert len(adapters) == 12
    assert all(np.asarray(adapter.b).any() for adapter in adapters.values())
