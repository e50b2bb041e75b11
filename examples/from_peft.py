"""Go on with an adapter that PEFT has trained, and give it back to PEFT.

Reads a folder with an adapter of sentence-transformers/all-MiniLM-L6-v2, as PEFT's
``save_pretrained`` writes it, puts it on the same pretrained weights in Flax, trains it further on
movie reviews, and writes a folder that ``peft.PeftModel.from_pretrained`` loads.
"""

import argparse
from pathlib import Path
from typing import Any

import bert
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reviews
from tqdm import tqdm

import jaxlora
from jaxlora.formats import peft

encode = jaxlora.lora(bert.SentenceEncoder().apply, strict=True)


def loss(trained: Any, base: Any, tokens: jax.Array, mask: jax.Array, labels: jax.Array) -> Any:
    """Return the mean logistic loss of a probe on the vectors of sentences."""
    adapters, probe = trained
    logits = encode(jaxlora.bind(base, adapters), tokens, mask) @ probe
    return optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)).mean()


def train(
    base: Any, adapters: dict[str, Any], sentences: reviews.Sentences, options: argparse.Namespace
) -> tuple[dict[str, Any], list[float]]:
    """Return the adapters after some steps, and the loss of each."""
    tx = optax.adam(options.learning_rate)

    @jax.jit
    def step(trained: Any, state: Any, base: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, base, *batch)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    trained = (adapters, jnp.zeros(bert.SentenceEncoder.width))
    state, losses = tx.init(trained), []
    draw = np.random.default_rng(0)
    for _ in tqdm(range(options.steps), desc="training"):
        batch = sentences.take(draw.integers(len(sentences.labels), size=options.batch))
        trained, state, value = step(trained, state, base, *batch)
        losses.append(float(value))
    return trained[0], losses


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where PEFT saved the adapter")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/from_peft"), help="default %(default)s"
    )
    parser.add_argument("--steps", type=int, default=60, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=32, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default %(default)s")
    options = parser.parse_args()

    weights, tokenizer = fetch.minilm()
    base = {"params": bert.encoder_params(weights)}
    _, sites = bert.shapes_and_sites()
    adapters = peft.load(options.folder, sites=sites, names=bert.NAMES)
    sentences, held_out = reviews.read_sentences(tokenizer, seed=0)
    few = (held_out.tokens[:32], held_out.mask[:32])
    plain, adapted = encode(base, *few), encode(jaxlora.bind(base, adapters), *few)
    moved = jnp.linalg.norm(adapted - plain) / jnp.linalg.norm(plain)
    print(f"{len(adapters)} adapters from {options.folder}, they move vectors by {moved:.1%}")

    adapters, losses = train(base, adapters, sentences, options)
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    print(f"loss {first:.3f} in the first steps, {last:.3f} in the last")

    name = "sentence-transformers/all-MiniLM-L6-v2"
    peft.save(options.out, adapters, names=bert.NAMES, sites=sites, base_model_name_or_path=name)
    print(f"saved to {options.out}, which peft.PeftModel.from_pretrained loads")


if __name__ == "__main__":
    main()
