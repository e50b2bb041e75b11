"""MiniLM, an encoder, learns classes of sentences."""

from typing import Any

import bert
import fetch
import jax
import numpy as np
import reviews
import wordnet
from reviews import Sentences

import jaxlora

from .tasks import Task, cross_entropy, head, logits, probe


def sentiment(quick: bool = False) -> Task:
    """MiniLM (22 M parameters) learns whether a sentence of a film review is good or bad."""
    return _of_sentences("sentiment", 2, 1.0, _reviews(quick), _glosses(quick), quick)


def glosses(quick: bool = False) -> Task:
    """MiniLM learns which of WordNet's 26 classes of nouns a definition is of.

    So many classes need a head of large weights. It sees larger vectors, so that the small rate of
    full fine-tuning makes one too in so few steps.
    """
    return _of_sentences("glosses", 26, 20.0, _glosses(quick), _reviews(quick), quick)


def _reviews(quick: bool) -> tuple[Sentences, Sentences]:
    train, held_out = reviews.read_sentences(fetch.minilm()[1], 0, 300 if quick else None)
    return _prepared(train, quick), _prepared(held_out, quick)


def _glosses(quick: bool) -> tuple[Sentences, Sentences]:
    train, held_out = wordnet.read_glosses(fetch.minilm()[1], 0, 300 if quick else 10_000)
    return _prepared(train, quick), _prepared(held_out, quick)


def _prepared(sentences: Sentences, quick: bool) -> Sentences:
    """Return sentences with labels that are numbers, cut to a length that two cores can train."""
    tokens, mask, labels = sentences
    length = reviews.LENGTHS[0 if quick else 1]
    return Sentences(tokens[:, :length], mask[:, :length], labels.astype(np.int32))


_WEIGHTS = {
    "q": ("query",),
    "k": ("key",),
    "v": ("value",),
    "o": ("attention_out",),
    "q,v": ("query", "value"),
    "q,k,v,o": ("query", "key", "value", "attention_out"),
    "mlp": ("up", "down"),
    "all": ("query", "key", "value", "attention_out", "up", "down"),
}


def _of_sentences(
    name: str,
    classes: int,
    scale: float,
    data: tuple[Sentences, Sentences],
    other: tuple[Sentences, Sentences],
    quick: bool,
) -> Task:
    """Return a task of sentences, whose head sees vectors times a scale.

    What may be forgotten is a probe of the other task.
    """
    encoder = bert.SentenceEncoder(layers=1 if quick else 6)
    pretrained = {
        name: leaf
        for name, leaf in bert.encoder_params(fetch.minilm()[0]).items()
        if not (quick and name.startswith("layer_") and name != "layer_0")
    }
    params = {"encoder": pretrained, "head": head(384, classes)}

    def encode(params, tokens, mask):
        return encoder.apply({"params": params["encoder"]}, tokens, mask)

    def fn(params, tokens, mask):
        return logits(params["head"], scale * encode(params, tokens, mask))

    vectors = jax.jit(jaxlora.lora(encode, strict=True))
    quiet: dict[str, Any] = {"leave": False, "doing": "evaluating"}
    held_back = 20 if quick else 400
    parts = {
        "validation": data[0].take(slice(held_back)),
        "held out": data[1].take(slice(1200)),
    }
    train = data[0].take(slice(held_back, None))

    def score(predict, params, part):
        found = reviews.run_sorted(predict, params, parts[part], **quiet)
        return float((found.argmax(-1) == parts[part].labels).mean())

    def probed(params, train, held_out):
        return probe(lambda x: reviews.run_sorted(vectors, params, x, **quiet), train, held_out)

    return Task(
        name=name,
        fn=fn,
        params=params,
        example=(train.tokens[:1], train.mask[:1]),
        inputs=lambda batch: (batch.tokens, batch.mask),
        loss=lambda out, batch: cross_entropy(out, batch.labels),
        batches=lambda seed: reviews.training_batches(train, 16, seed),
        score=score,
        general=lambda params: probed(params, other[0].take(slice(600)), other[1].take(slice(400))),
        probe=lambda: probed(params, train, parts["held out"]),
        weights=_WEIGHTS,
        leaves={"new": "head/.*", "head": "head/.*", "biases": ".*/bias", "all": ".*"},
        higher_is_better=True,
        steps=4 if quick else 150,
    )
