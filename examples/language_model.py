"""Fine-tune SmolLM2, a decoder of 135 million parameters, to answer questions.

The questions are made by reasoning-gym, or are WordNet's nouns to define; what is held out is never
trained on. Prints how the model answers before and after, and what it says. Saves the adapters, in
jaxlora's form and as a folder that PEFT loads, with a picture of the loss. A run that is stopped or
killed goes on with --resume, and ends as if it had never been.
"""

import argparse
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import answers
import fetch
import jax
import jax.numpy as jnp
import long_run
import matplotlib
import meshes
import numpy as np
import optax
import questions
import runs
import smollm
import tokenizers
import wordnet
from answers import Answers
from jax.experimental import multihost_utils

import jaxlora
from jaxlora.analysis import plot
from jaxlora.formats import peft

DECIDING = (
    *("task", "seed", "held_out", "layers", "rank", "steps", "batch", "accumulate", "rate"),
    *("dropout", "qlora"),
)
TARGETS = ("query", "key", "value", "attention_out", "gate", "up", "down")
NOT_FINITE = 5  # steps in a row that are skipped for a gradient that is not; then it ends


class State(NamedTuple):
    """What a step changes: the adapters, the optimizer's state, and the key of the dropout."""

    adapters: dict[str, jaxlora.Adapter]
    optimizer: Any
    key: jax.Array


class Model(NamedTuple):
    """A language model with pretrained weights, and its tokenizer."""

    module: smollm.LanguageModel
    params: Any
    tokenizer: tokenizers.Tokenizer


def pretrained(options: argparse.Namespace) -> Model:
    """Return the model, placed on the devices, and quantized if that is asked for."""
    file = fetch.smollm()
    params = meshes.placed(smollm.load(file, options.layers), options.mesh)
    module = smollm.LanguageModel(layers=options.layers, remat=options.remat)
    if options.qlora:
        config = jaxlora.QuantizationConfig("nf4")
        params = jaxlora.quantize(module.apply, params, np.zeros((1, 8), np.int32), config=config)
    return Model(module, params, smollm.tokenizer(file))


def read(options: argparse.Namespace, tokenizer: tokenizers.Tokenizer) -> tuple[Answers, Answers]:
    """Return what is trained on, and what is held out."""
    if options.task == "definitions":
        return wordnet.read_definitions(tokenizer, options.seed, held_out=options.held_out)
    pairs = [
        [question.pair for question in part]
        for part in questions.read(options.task, options.seed, 8000, options.held_out)
    ]
    train, held_out = (answers.encoded(tokenizer, part, 64) for part in pairs)
    return answers.cut(train), answers.cut(held_out)


def optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    """Return Adam, which skips what is not finite, on sums of gradients if so asked."""
    updates = options.steps // options.accumulate
    schedule = optax.warmup_cosine_decay_schedule(0, options.rate, max(1, updates // 10), updates)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    if options.accumulate == 1:
        return optax.apply_if_finite(tx, NOT_FINITE)
    return optax.MultiSteps(  # what is not finite must not get into a sum either
        tx, options.accumulate, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation()


def start(options: argparse.Namespace, model: Model, tx: Any) -> tuple[Any, State]:
    """Return the frozen base, and the state before the first step."""
    config = jaxlora.LoRAConfig(rank=options.rank, alpha=2 * options.rank, targets=TARGETS)
    first, key = jax.random.split(jax.random.key(options.seed))
    tokens = np.zeros((1, 8), np.int32)
    adapted = jaxlora.init(first, model.module.apply, model.params, tokens, config=config)
    base, adapters = jaxlora.split(adapted)
    state = State(adapters, tx.init(adapters), jax.random.key_data(key))
    return base, meshes.committed(state, options.mesh)


def training_step(options: argparse.Namespace, fn: Callable[..., Any], tx: Any) -> Any:
    """Return the compiled step ``(state, base, batch) -> (state, loss)``."""

    def step(state, base, batch):
        key, now = jax.random.split(jax.random.wrap_key_data(state.key))

        def loss(adapters):
            params = jaxlora.bind(base, adapters)
            params = jaxlora.dropout(params, now, options.dropout) if options.dropout else params
            total, count = answers.total_loss(fn(params, batch.tokens), batch)
            return total / count

        value, grads = jax.value_and_grad(loss)(state.adapters)
        updates, state_of_tx = tx.update(grads, state.optimizer, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
        return State(adapters, state_of_tx, jax.random.key_data(key)), value

    return jax.jit(step, donate_argnums=0)


def begun(
    options: argparse.Namespace, checkpoints: long_run.Checkpoints, state: State, data: Any
) -> tuple[State, dict[str, Any]]:
    """Return the state to go on from and the history of the run; set the data to its place."""
    if checkpoints.latest() is None:  # also of a run that was killed before its first
        return state, {"options": deciding(options), "losses": []}
    if not options.resume:
        raise SystemExit(f"{options.out} holds a run: go on with --resume, or choose another --out")
    history = checkpoints.history()
    runs.check_same(history["options"], deciding(options), options.out)
    return checkpoints.restore(state, data), history


def train(
    options: argparse.Namespace, model: Model, fn: Callable[..., Any], rows: Answers
) -> tuple[Any, dict[str, jaxlora.Adapter], list[float]]:
    """Return the base, the trained adapters, and the loss of every step."""
    tx = optimizer(options)
    base, state = start(options, model, tx)
    data = long_run.batches(
        len(rows.tokens), options.batch, options.seed, lambda chosen: answers.cut(rows.take(chosen))
    )
    checkpoints = long_run.Checkpoints(options.out / "checkpoints", options.save_every)
    with contextlib.closing(checkpoints), runs.asked_to_stop() as asked:
        state, history = begun(options, checkpoints, state, data)
        step, losses = training_step(options, fn, tx), history["losses"]
        with long_run.Progress(options.steps, len(losses)) as bar:
            if options.resume and not losses:
                bar.say(f"no checkpoint in {options.out} yet: begins at the first step")
            for i in range(len(losses) + 1, options.steps + 1):
                batch = next(data)
                state, value = step(state, base, meshes.spread(batch, options.mesh))
                losses.append(float(value))
                bar.tell(losses, batch.tokens.size)
                stop = asked.is_set() or checkpoints.preempted(i)
                checkpoints.save(i, state, data, history, force=stop or i == options.steps)
                if not np.isfinite(losses[-NOT_FINITE:]).any():
                    raise SystemExit(
                        f"the last {NOT_FINITE} losses are not finite: try a smaller --rate; what "
                        f"was trained before is in {options.out}"
                    )
                if stop and i < options.steps:
                    checkpoints.wait()
                    bar.say(f"stopped at step {i}, which is saved in {options.out}, for --resume")
                    raise SystemExit(128 + signal.SIGTERM)
    return base, state.adapters, losses


def deciding(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the result."""
    return {name: getattr(options, name) for name in DECIDING}


def samples(model: Model, params: Any, rows: Answers, steps: int) -> Iterator[tuple[str, str]]:
    """Yield pairs of a prompt and what the model says, for a few prompts of one length."""
    lengths = rows.mask.argmax(1)
    length = np.bincount(lengths).argmax()
    prompts = rows.tokens[lengths == length][:3, :length]
    cached = jaxlora.lora(model.module.apply)
    found = smollm.generate(params, cached, jnp.asarray(prompts), steps, model.module)
    found = multihost_utils.process_allgather(found, tiled=True)
    for prompt, said in zip(prompts, found, strict=True):
        yield (
            model.tokenizer.decode(prompt.tolist()),
            model.tokenizer.decode(said.tolist(), skip_special_tokens=False).split(smollm.END)[0],
        )


def told(name: str, score: answers.Score) -> str:
    """Return a line of a table."""
    return f"{name:8} {score.loss:14.3f} {np.exp(score.loss):12.1f} {score.exact:13.1%}"


def save(
    options: argparse.Namespace, model: Model, adapters: dict[str, Any], losses: list[float]
) -> None:
    """Write the adapters in both forms, and the picture of the loss."""
    jaxlora.save_adapters(options.out / "adapters", adapters)
    tokens = np.zeros((1, 8), np.int32)
    sites = jaxlora.find_sites(model.module.apply, model.params, tokens)
    name = {"base_model_name_or_path": smollm.NAME}
    peft.save(options.out / "peft", adapters, names=smollm.NAMES, sites=sites, **name)
    if jax.process_index() != 0:
        return
    matplotlib.use("agg")
    axes = plot.training({options.task: losses})
    axes.set(ylabel="loss (nats a token)")
    axes.figure.savefig(options.out / "loss.png", dpi=120)


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    tasks = (*questions.SETTINGS, "definitions")
    parser.add_argument("--task", choices=tasks, default="basic_arithmetic", help="to learn")
    parser.add_argument("--steps", type=int, default=100, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--accumulate", type=int, default=1, help="steps to an update")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the adapters' inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the adapters")
    parser.add_argument("--held-out", type=int, default=128, help="rows to judge by")
    parser.add_argument("--qlora", action="store_true", help="keep the weights in 4 bits (NF4)")
    parser.add_argument("--remat", action="store_true", help="compute more, hold less in memory")
    parser.add_argument("--layers", type=int, default=30, help="use the first ones, for a look")
    parser.add_argument("--mesh", help="devices as fsdp x tensor, e.g. 4x2")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if any"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/language"), help="results")
    options = parser.parse_args(args)
    if options.held_out % 8:  # rows at a time, see `answers.judge`
        parser.error(f"--held-out must be a multiple of 8: got {options.held_out}")
    for name in ("steps", "batch", "accumulate", "rank", "held_out", "layers", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more: got {vars(options)[name]}")
    return options


def main() -> None:
    """Run the example."""
    options, begun = parse_args(), time.perf_counter()
    if options.distributed:
        jax.distributed.initialize()
    options.mesh = meshes.made(options.mesh)
    say = print if jax.process_index() == 0 else lambda text: None
    model = pretrained(options)
    rows, held_out = read(options, model.tokenizer)
    say(f"{len(rows.tokens):,} rows to train on, {len(held_out.tokens):,} held out")
    fn = jaxlora.lora(model.module.apply, strict=True)
    predict = jax.jit(fn)
    before = answers.judge(predict, model.params, held_out)
    base, adapters, losses = train(options, model, fn, rows)
    adapted = jaxlora.bind(base, adapters)
    after = answers.judge(predict, adapted, held_out)
    say(f"held out   nats a token   perplexity   exact match\n{told('before', before)}")
    say(told("after", after))
    steps = int(held_out.mask.sum(1).max())
    said = [samples(model, params, held_out, steps) for params in (model.params, adapted)]
    for (prompt, first), (_, second) in zip(*said, strict=True):
        say(f"{' '.join(prompt.split())}\n  before: {first!r}\n  after:  {second!r}")
    save(options, model, adapters, losses)
    say(f"saved to {options.out}: adapters, a folder for PEFT, loss.png")
    say(f"total {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
