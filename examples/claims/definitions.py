"""SmolLM2, a decoder, learns to define words."""

import pydoc_data.topics
from typing import Any

import answers
import fetch
import jax
import numpy as np
import smollm
import wordnet
from answers import Answers

import jaxlora

from .tasks import Task

LENGTH = 24  # tokens of a prompt and its definition
_WEIGHTS = ("query", "key", "value", "attention_out", "gate", "up", "down")


def model_and_params(quick: bool) -> tuple[smollm.LanguageModel, Any]:
    """Return SmolLM2 and its weights; two layers of it if all is to be quick."""
    model = smollm.LanguageModel(layers=2) if quick else smollm.MODEL
    return model, smollm.load(fetch.smollm(), model.layers)


def definitions(quick: bool = False) -> Task:
    """SmolLM2 (135 M parameters, rounded to 4 bits by others) defines nouns as WordNet does."""
    model, params = model_and_params(quick)
    tokenizer = smollm.tokenizer(fetch.smollm())
    train, held_out = wordnet.read_definitions(tokenizer, 0, length=LENGTH)
    held_back, rows = (8, 8) if quick else (64, 96)
    parts = {
        "validation": train.take(slice(held_back)),
        "held out": held_out.take(slice(rows)),
    }
    train = train.take(slice(held_back, None))
    other = _text(tokenizer, held_back)
    predict_other = jax.jit(jaxlora.lora(model.apply, strict=True))

    def batches(seed):
        rng = np.random.default_rng(seed)
        while True:
            yield train.take(rng.choice(len(train.tokens), 8, replace=False))

    return Task(
        name="definitions",
        fn=model.apply,
        params=params,
        example=(train.tokens[:1],),
        inputs=lambda batch: (batch.tokens,),
        loss=lambda out, batch: answers.total_loss(out, batch)[0] / batch.mask.sum(),
        batches=batches,
        score=lambda predict, params, part: answers.judge(predict, params, parts[part]).loss,
        general=lambda params: answers.judge(predict_other, params, other).loss,
        probe=lambda: None,
        weights={"all": _WEIGHTS, "q,v": ("query", "value")},
        leaves={  # it has no new head and no biases: norms stand for them
            "new": "(?!)",
            "head": "params/word/embedding",
            "biases": ".*/scale",
            "all": ".*",
        },
        higher_is_better=False,
        steps=3 if quick else 30,
    )


def _text(tokenizer: Any, rows: int) -> Answers:
    """Return pieces of what Python's help says of its topics; all of their tokens count."""
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = np.array(tokenizer.encode(text[:200_000]).ids, np.int32)
    step = len(tokens) // rows
    found = np.stack([tokens[i * step : i * step + LENGTH] for i in range(rows)])
    return Answers(found, np.ones(found.shape, bool))
