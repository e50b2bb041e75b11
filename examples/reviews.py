"""Movie-review sentences as token ids, and how they are put into batches.

A batch is padded to the first of a few lengths that holds it, so that there are few programs to
compile; longer sentences are cut.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fetch
import jax
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

LENGTHS = (16, 24, 32)


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
    ratings = np.array([score > 0 for score, _ in rows])
    sentences = encoded(tokenizer_path, [text for _, text in rows], ratings)
    return divided(sentences.take(np.random.default_rng(seed).permutation(len(rows))[:count]))


def encoded(tokenizer_path: Path, texts: list[str], labels: np.ndarray) -> Sentences:
    """Return texts as token ids, all padded or cut to the last of `LENGTHS`."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.enable_truncation(LENGTHS[-1])
    tokenizer.enable_padding(length=LENGTHS[-1])
    found = tokenizer.encode_batch(texts)
    return Sentences(
        np.array([e.ids for e in found], np.int32),
        np.array([e.attention_mask for e in found], bool),
        labels,
    )


def divided(sentences: Sentences) -> tuple[Sentences, Sentences]:
    """Return four fifths of sentences, to train on, and the rest, held out."""
    held_out = len(sentences.labels) // 5
    return sentences.take(slice(held_out, None)), sentences.take(slice(held_out))


def run_sorted(
    fn: Any,
    params: Any,
    sentences: Sentences,
    *,
    batch: int = 32,
    lengths: tuple[int, ...] = LENGTHS,
    doing: str = "evaluating",
    leave: bool = True,
) -> np.ndarray:
    """Return ``fn(params, tokens, mask)`` for all sentences, short ones in short batches.

    Args:
        fn: a compiled function. The next call is made before the last one has its result, so that
            programs for other lengths are compiled while others run.
        params: its first argument.
        sentences: what to run it on.
        batch: sentences in a call.
        lengths: what a batch may be padded to.
        doing: what the progress bar says.
        leave: whether the bar stays when all is done.
    """
    order = np.argsort(sentences.mask.sum(1), kind="stable")
    outs: list[Any] = []
    for start in tqdm(range(0, len(order), batch), desc=doing, unit="batch", leave=leave):
        rows = np.resize(order[start : start + batch], batch)  # the last batch wraps around
        part = trimmed(sentences.take(rows), lengths)
        outs.append(fn(params, part.tokens, part.mask))
        jax.block_until_ready(outs[-3:-2])  # two calls are under way
    found = np.concatenate(outs)[: len(order)]
    result = np.empty_like(found)
    result[order] = found
    return result


def training_batches(sentences: Sentences, size: int, seed: int) -> Iterator[Sentences]:
    """Yield batches without end, each of sentences of like length, in random order."""
    if len(sentences.labels) < size:
        raise ValueError(
            f"too few sentences for a batch: {size} are needed, got {len(sentences.labels)}"
        )
    rng = np.random.default_rng(seed)
    lengths = sentences.mask.sum(1)
    while True:
        shuffled = rng.permutation(len(lengths))
        shuffled = shuffled[: len(shuffled) // size * size]
        by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
        for rows in rng.permutation(by_length.reshape(-1, size)):
            yield trimmed(sentences.take(rows))


def trimmed(sentences: Sentences, lengths: tuple[int, ...] = LENGTHS) -> Sentences:
    """Return sentences without most of the padding that none of them needs."""
    length = next(n for n in lengths if n >= sentences.mask.sum(1).max())
    tokens, mask, labels = sentences
    return Sentences(tokens[:, :length], mask[:, :length], labels)


def accuracy(logits: np.ndarray, sentences: Sentences) -> float:
    """Return the share of labels that the logits' signs give."""
    return float(((logits > 0) == sentences.labels).mean())
