"""What is learned: a pretrained model, its data, how it is scored, and what it may forget."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from sklearn.linear_model import LogisticRegression

Predict = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and what it is to learn.

    Attributes:
        name: of the task.
        fn: ``fn(params, *inputs) -> outputs``.
        params: of the pretrained model, with a head of zeros.
        example: inputs of one row.
        inputs: the inputs of a batch.
        loss: ``loss(outputs, batch)``, a mean.
        batches: batches to train on, without end, for a seed.
        score: ``score(predict, params, part)`` on the part ``"validation"``, which the rates are
            chosen by, or ``"held out"``; ``predict`` is ``fn``, compiled, for adapted parameters.
        general: the same for what the model could do before, on other data.
        probe: score of a logistic regression on the frozen model's vectors; None where there are
            no classes.
        weights: names of sets of weights, and the targets that each is.
        leaves: regular expressions of paths: of the ``new`` leaves, which the pretrained model does
            not have and every arm trains, of the ``head``, of ``biases`` and of ``all``.
        higher_is_better: whether a score is an accuracy, or a loss in nats.
        steps: of a training run.
    """

    name: str
    fn: Predict
    params: Any
    example: tuple[Any, ...]
    inputs: Callable[[Any], tuple[Any, ...]]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int], Iterator[Any]]
    score: Callable[[Predict, Any, str], float]
    general: Callable[[Any], float]
    probe: Callable[[], float | None]
    weights: Mapping[str, Any]
    leaves: Mapping[str, str]
    higher_is_better: bool
    steps: int


def path_of(path: tuple[Any, ...]) -> str:
    """Return a path as jaxlora writes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    """Return the mean loss ``()`` of logits ``(batch, classes)`` for labels ``(batch,)``."""
    log = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log, labels[:, None], axis=-1).mean()


def head(width: int, classes: int) -> dict[str, jax.Array]:
    """Return a head of zeros."""
    return {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}


def logits(params: Any, vectors: jax.Array) -> jax.Array:
    """Return what a head makes of vectors."""
    return vectors @ params["kernel"] + params["bias"][None]


def probe(encode: Callable[[Any], Any], train: Any, held_out: Any) -> float:
    """Return the accuracy of a logistic regression on vectors, with labels of the two sets."""
    found = LogisticRegression(max_iter=1000).fit(encode(train), train.labels)
    return float(found.score(encode(held_out), held_out.labels))
