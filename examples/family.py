"""Compare the family of LoRA on the data of `sentiment.py`: equal steps, one table.

Each variant trains adapters on query and value and the head, from the same pretrained weights and
on the same batches, at each of some learning rates; full fine-tuning trains everything, at a tenth
of each.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fetch
import jax
import numpy as np
import optax
import reviews
import sentiment
from tqdm import tqdm

import jaxlora

LORA = jaxlora.LoRAConfig(rank=8, alpha=16.0, targets=("query", "value"), train=("head",))
VARIANTS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "LoRA": ({}, lambda tx: tx),
    "rsLoRA": ({"rank_stabilized": True}, lambda tx: tx),
    "DoRA": ({"magnitude": True}, lambda tx: tx),
    "PiSSA": ({"initializer": "pissa"}, lambda tx: tx),
    "OLoRA": ({"initializer": "olora"}, lambda tx: tx),
    "MiLoRA": ({"initializer": "milora"}, lambda tx: tx),
    "LoRA+": ({}, lambda tx: optax.chain(tx, jaxlora.optim.scale_rates(b=4))),
    "LoRA-FA": ({}, lambda tx: jaxlora.freeze(tx, train=("b", "value"))),
    "QLoRA": ({}, lambda tx: tx),
    "QLoRA + LoftQ": ({}, lambda tx: tx),
}
QUANTIZED = {"QLoRA": 0, "QLoRA + LoftQ": 5}  # nf4, and iterations of LoftQ
FULL = "full fine-tuning"


def adapted(name: str, params: Any, example: Any, seed: int) -> tuple[Any, Any, Any]:
    """Return what is trained, what is not, and a function that puts both together."""
    if name == FULL:
        return params, (), lambda params, _: params
    model, (changes, _) = sentiment.MODEL, VARIANTS[name]
    config = dataclasses.replace(LORA, **changes)
    if name in QUANTIZED:
        if iterations := QUANTIZED[name]:
            start = jaxlora.initializers.loftq(params, iterations=iterations)
            config = dataclasses.replace(config, initializer=start)
        nf4 = jaxlora.QuantizationConfig("nf4", exclude=("head",))
        params = jaxlora.quantize(model.apply, params, *example, config=nf4)
    params = jaxlora.init(jax.random.key(seed), model.apply, params, *example, config=config)
    base, adapters = jaxlora.split(params)
    return adapters, base, lambda adapters, base: jaxlora.bind(base, adapters)


def trained(name: str, rate: float, params: Any, data: Any, options: Any) -> dict[str, float]:
    """Train one variant, and return its figures."""
    sentences, held_out = data
    example = (sentences.tokens[:1], sentences.mask[:1])
    trainable, frozen, together = adapted(name, params, example, options.seed)
    rate = rate / 10 if name == FULL else rate
    tx = optax.adamw(optax.cosine_decay_schedule(rate, options.steps))
    tx = tx if name == FULL else VARIANTS[name][1](tx)
    apply = jaxlora.lora(sentiment.MODEL.apply, strict=True)

    @jax.jit
    def step(trainable, state, frozen, batch):
        def loss(trainable):
            logits = apply(together(trainable, frozen), batch.tokens, batch.mask)
            return optax.sigmoid_binary_cross_entropy(logits, batch.labels).mean()

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    first, state, losses, seconds = trainable, tx.init(trainable), [], []
    batches = reviews.training_batches(sentences, options.batch, options.seed)
    for _ in tqdm(range(options.steps), desc=f"{name} at {rate:g}", unit="step"):
        start = time.perf_counter()
        trainable, state, value = step(trainable, state, frozen, next(batches))
        losses.append(float(value))
        seconds.append(time.perf_counter() - start)
    logits = reviews.run_sorted(jax.jit(apply), together(trainable, frozen), held_out)
    pairs = zip(jax.tree.leaves(trainable), jax.tree.leaves(first), strict=True)
    return {
        "held_out": reviews.accuracy(logits, held_out),
        "loss": float(np.mean(losses[-50:])),
        "parameters": sum(x.size for x, y in pairs if np.any(x != y)),
        "step_s": float(np.median(seconds)),
    }


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps of each")
    parser.add_argument("--batch", type=int, default=16, help="sentences in a step")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 1e-3], help="to try")
    parser.add_argument("--seed", type=int, default=1, help="of the split, the factors, the order")
    parser.add_argument("--sentences", type=int, help="use so many, for a quick look")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, FULL], help="to train")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    if unknown := {*options.variants} - {*VARIANTS, FULL}:
        parser.error(f"no such variants: {sorted(unknown)}; there are {[*VARIANTS, FULL]}")
    fetch.everything(fetch.minilm, fetch.reviews)
    params, tokenizer = sentiment.load_pretrained()
    data = reviews.read_sentences(tokenizer, options.seed, options.sentences)
    right, params["params"]["head"] = sentiment.probe(params, *data)
    baseline = float(right.mean())
    print(
        f"frozen model and logistic regression: {baseline:.2%} of {len(data[1].labels):,} held out"
    )
    results = {
        name: {f"{rate:g}": trained(name, rate, params, data, options) for rate in options.rates}
        for name in options.variants
    }
    print(f"\n{'':18}" + "".join(f"{rate:>9g}" for rate in options.rates) + "     trained")
    for name, at in results.items():
        figures = "".join(f"{found['held_out']:9.2%}" for found in at.values())
        print(f"{name:18}{figures}{next(iter(at.values()))['parameters']:>12,}")
    if options.out:
        about: dict[str, Any] = {k: v for k, v in vars(options).items() if k != "out"}
        about |= {"baseline": baseline, "results": results}
        options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
