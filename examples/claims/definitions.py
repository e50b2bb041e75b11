"""SmolLM2, a decoder, learns to define words."""

import pydoc_data.topics
from typing import Any

import fetch
import jax
import jax.numpy as jnp
import numpy as np
import smollm
import wordnet

import jaxlora

from .tasks import Task

LENGTH = 24  # tokens of a prompt and its definition
_WEIGHTS = ("query", "key", "value", "attention_out", "gate", "up", "down")


def model_and_params(quick: bool) -> tuple[smollm.LanguageModel, Any]:
    """Return SmolLM2 and its weights; two layers of it if all is to be quick."""
    params = smollm.load(fetch.smollm())
    if not quick:
        return smollm.MODEL, params
    layers = jax.tree.map(lambda leaf: leaf[:2], params["params"]["layers"])
    return smollm.LanguageModel(layers=2), {"params": params["params"] | {"layers": layers}}


def definitions(quick: bool = False) -> Task:
    """SmolLM2 (135 M parameters, rounded to 4 bits by others) defines nouns as WordNet does."""
    model, params = model_and_params(quick)
    tokenizer = smollm.tokenizer(fetch.smollm())
    train, held_out = wordnet.read_definitions(tokenizer, 0, length=LENGTH)
    held_back, rows = (8, 8) if quick else (64, 96)
    parts = {
        "validation": wordnet.Definitions(*(field[:held_back] for field in train)),
        "held out": wordnet.Definitions(*(field[:rows] for field in held_out)),
    }
    train = wordnet.Definitions(*(field[held_back:] for field in train))
    other = _text(tokenizer, held_back)
    predict_other = jax.jit(jaxlora.lora(model.apply, strict=True))

    def batches(seed):
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.choice(len(train.tokens), 8, replace=False)
            yield wordnet.Definitions(*(field[rows] for field in train))

    return Task(
        name="definitions",
        fn=model.apply,
        params=params,
        example=(train.tokens[:1],),
        inputs=lambda batch: (batch.tokens,),
        loss=lambda out, batch: _losses(out, batch)[0] / batch.mask.sum(),
        batches=batches,
        score=lambda predict, params, part: _mean_loss(predict, params, parts[part]),
        general=lambda params: _mean_loss(predict_other, params, other),
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


def _losses(logits: jax.Array, batch: wordnet.Definitions) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the losses of the tokens that count, and how many these are."""
    log = jax.nn.log_softmax(logits[:, :-1])
    losses = -jnp.take_along_axis(log, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    counts = jnp.asarray(batch.mask)[:, 1:]
    return (losses * counts).sum(), counts.sum()


_summed = jax.jit(_losses)


def _mean_loss(predict: Any, params: Any, data: wordnet.Definitions) -> float:
    total, count = 0.0, 0
    for start in range(0, len(data.tokens), 8):
        batch = wordnet.Definitions(*(field[start : start + 8] for field in data))
        losses, tokens = _summed(predict(params, batch.tokens), batch)
        total, count = total + float(losses), count + int(tokens)
    return total / count


def _text(tokenizer: Any, rows: int) -> wordnet.Definitions:
    """Return pieces of what Python's help says of its topics; all of their tokens count."""
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = np.array(tokenizer.encode(text[:200_000]).ids, np.int32)
    step = len(tokens) // rows
    found = np.stack([tokens[i * step : i * step + LENGTH] for i in range(rows)])
    return wordnet.Definitions(found, np.ones(found.shape, bool))
