"""Prompts and their answers as tokens: what is trained on, and how a model's answers are judged."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from smollm import END
from tokenizers import Tokenizer


class Answers(NamedTuple):
    """Token ids ``(n, length)`` of prompts with their answers, and which are of the answers.

    The answer's tokens, ``mask`` ``(n, length)``, end with `END`; they are what is to be predicted,
    each from the tokens before it. The rest is the prompt, and padding after the answer.
    """

    tokens: np.ndarray
    mask: np.ndarray

    def take(self, rows: Any) -> "Answers":
        """Return some of the rows."""
        return Answers(self.tokens[rows], self.mask[rows])


class Score(NamedTuple):
    """How a model answers.

    Attributes:
        loss: mean of all tokens of the answers, in nats.
        exact: share of the answers that the model gives to the letter when it takes the likeliest
            token each time.
    """

    loss: float
    exact: float


def encoded(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], length: int) -> Answers:
    """Return prompts and answers as tokens.

    Args:
        tokenizer: of the language model.
        pairs: of a prompt and its answer.
        length: tokens of each, with padding.

    Raises:
        ValueError: a prompt with its answer is longer.
    """
    tokens = np.full((len(pairs), length), tokenizer.token_to_id(END), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, pair in enumerate(pairs):
        start, end = _ids(tokenizer, pair)
        stop = len(start) + len(end)
        if stop > length:
            raise ValueError(f"a row must have at most {length} tokens: {pair[0]!r} needs {stop}")
        tokens[i, :stop] = start + end
        mask[i, len(start) : stop] = True
    return Answers(tokens, mask)


def length(tokenizer: Tokenizer, pair: tuple[str, str]) -> int:
    """Return the number of tokens of a prompt and its answer."""
    return sum(map(len, _ids(tokenizer, pair)))


def _ids(tokenizer: Tokenizer, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
    return tokenizer.encode(pair[0]).ids, tokenizer.encode(pair[1] + END).ids


def cut(rows: Answers, multiple: int = 8) -> Answers:
    """Return rows without the padding that none needs, up to a multiple: few shapes to compile."""
    longest = int(rows.mask.any(0).nonzero()[0][-1]) + 1
    length = min(-(-longest // multiple) * multiple, rows.tokens.shape[1])
    return Answers(rows.tokens[:, :length], rows.mask[:, :length])


def total_loss(logits: jax.Array, batch: Answers) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the losses of the answers' tokens, in nats, and how many these are."""
    log = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    losses = -jnp.take_along_axis(log, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    counts = jnp.asarray(batch.mask)[:, 1:]
    return jnp.where(counts, losses, 0).sum(), counts.sum()


def exact(logits: jax.Array, batch: Answers) -> jax.Array:
    """Return which answers ``(batch,)`` are exact: each token is the likeliest after those before.

    Where all of them are, they are what `smollm.generate` would give.
    """
    same = logits[:, :-1].argmax(-1) == batch.tokens[:, 1:]
    return (same | ~jnp.asarray(batch.mask)[:, 1:]).all(-1)


@jax.jit
def _judged(logits: jax.Array, batch: Answers) -> tuple[jax.Array, jax.Array, jax.Array]:
    return *total_loss(logits, batch), exact(logits, batch).sum()


def judge(predict: Callable[..., jax.Array], params: Any, rows: Answers, batch: int = 8) -> Score:
    """Return how a model answers rows, in their order and so many at a time.

    Args:
        predict: compiled ``(params, tokens) -> logits``.
        params: of the model.
        rows: to answer.
        batch: rows at a time, which must divide their number: one shape is compiled for.
    """
    if len(rows.tokens) % batch:
        raise ValueError(f"batch must divide the number of rows, {len(rows.tokens)}: got {batch}")
    totals = np.zeros(3)
    for start in range(0, len(rows.tokens), batch):
        part = rows.take(slice(start, start + batch))
        totals += np.array(_judged(predict(params, part.tokens), part))
    loss, tokens, right = totals
    return Score(float(loss / tokens), float(right / len(rows.tokens)))
