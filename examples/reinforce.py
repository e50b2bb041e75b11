"""Let SmolLM2 find out by trial what a verifier rewards: REINFORCE, without a critic.

Several answers are drawn for each question, reasoning-gym judges them, and what did better than the
other answers to the same question becomes likelier (Ahmadian et al. 2024, arXiv:2402.14740; as in
DeepSeek's GRPO, arXiv:2402.03300, the policy is held near to where it began). With ``--loss dpo``
the answers to a question are compared in pairs (DPO, Rafailov et al. 2023, arXiv:2305.18290, with
answers that are drawn as it learns, Guo et al. 2024, arXiv:2402.04792). Adapters of rank 1 are
trained. Without them the model is the one that it began as: no second copy of the weights.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import fetch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import questions
import smollm
import tokenizers
from questions import Question
from tqdm import tqdm

import jaxlora

FAMILY = "letter_counting"
BETAS = {"reinforce": 0.02, "dpo": 0.1}  # the losses, and how much the divergence counts
DRAWN = 3  # tokens of an answer: a number, and its end


def read(
    tokenizer: tokenizers.Tokenizer, seed: int, train: int, held_out: int
) -> tuple[list[Question], list[Question]]:
    """Return questions to train on and others, all with prompts of the commonest length."""

    def length(question):
        return len(tokenizer.encode(question.pair[0]).ids)

    found = questions.read(FAMILY, seed, 20 * train, 20 * held_out)
    common = np.bincount([length(question) for question in found[0]]).argmax()
    first, second = ([q for q in part if length(q) == common] for part in found)
    return first[:train], second[:held_out]


def prompts(tokenizer: tokenizers.Tokenizer, asked: Sequence[Question]) -> np.ndarray:
    """Return the ids ``(questions, time)`` of prompts of one length."""
    return np.array([tokenizer.encode(question.pair[0]).ids for question in asked], np.int32)


def rewards(
    tokenizer: tokenizers.Tokenizer, asked: Sequence[Question], drawn: np.ndarray
) -> np.ndarray:
    """Return what reasoning-gym gives for each answer; 0 for one that does not end."""
    texts = [tokenizer.decode(row, skip_special_tokens=False) for row in drawn.tolist()]
    return np.array(
        [
            questions.reward(FAMILY, question, text.split(smollm.END)[0]) * (smollm.END in text)
            for question, text in zip(asked, texts, strict=True)
        ],
        np.float32,
    )


def advantages(rewards: jax.Array) -> jax.Array:
    """Return rewards ``(questions, samples)`` less the mean of the other answers'."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * count / (count - 1)


def up_to_end(drawn: jax.Array, end: int) -> jax.Array:
    """Return which tokens ``(batch, steps)`` are of the answer: to the first end, and that too."""
    is_end = (drawn == end).astype(jnp.int32)
    return jnp.cumsum(is_end, axis=1) - is_end == 0


def log_probabilities(
    fn: Callable[..., jax.Array], params: Any, prompt: jax.Array, drawn: jax.Array
) -> jax.Array:
    """Return the logarithm of the probability of each drawn token, ``(batch, steps)``."""
    logits = fn(params, jnp.concatenate([prompt, drawn], 1)[:, :-1])
    log = jax.nn.log_softmax(logits[:, prompt.shape[1] - 1 :])
    return jnp.take_along_axis(log, drawn[..., None], axis=-1)[..., 0]


def policy_loss(
    log: jax.Array, reference: jax.Array, counts: jax.Array, advantage: jax.Array, beta: float
) -> jax.Array:
    """Return the loss whose gradient is that of REINFORCE, with the divergence in the reward.

    The expected gradient is minus that of the expected reward, plus beta times that of the KL
    divergence from the reference.

    Args:
        log: logarithms of the probabilities of the drawn tokens, ``(batch, steps)``.
        reference: the same of the model without adapters.
        counts: which tokens are of an answer, bool ``(batch, steps)``.
        advantage: of each answer, ``(batch,)``.
        beta: how much the divergence from the reference counts.
    """
    of_answers = jnp.where(counts, log, 0).sum(1)
    away = of_answers - jnp.where(counts, reference, 0).sum(1)
    return -((advantage - beta * jax.lax.stop_gradient(away)) * of_answers).mean()


def pairs_loss(
    log: jax.Array, reference: jax.Array, counts: jax.Array, rewards: jax.Array, beta: float
) -> jax.Array:
    """Return DPO's loss, a mean over the pairs of answers to one question with unequal rewards.

    Args:
        log: as of `policy_loss`, the answers to each question one after another.
        reference: the same of the model without adapters.
        counts: which tokens are of an answer, bool ``(batch, steps)``.
        rewards: ``(questions, samples)``.
        beta: how much the divergence from the reference counts.
    """
    away = jnp.where(counts, log - reference, 0).sum(1).reshape(rewards.shape)
    better = rewards[:, :, None] > rewards[:, None, :]
    margin = away[:, :, None] - away[:, None, :]
    losses = jnp.where(better, -jax.nn.log_sigmoid(beta * margin), 0)
    return losses.sum() / jnp.maximum(1, better.sum(dtype=losses.dtype))


def training_step(
    options: argparse.Namespace, fn: Callable[..., jax.Array], tx: Any, end: int
) -> Any:
    """Return the compiled step ``(adapters, state, base, prompt, drawn, rewards)``."""

    @jax.jit
    def step(adapters, state, base, prompt, drawn, rewards):
        reference = log_probabilities(fn, base, prompt, drawn)
        counts = up_to_end(drawn, end)

        def loss(adapters):
            params = jaxlora.bind(base, adapters)
            log = log_probabilities(fn, params, prompt, drawn)
            if options.loss == "dpo":
                return pairs_loss(log, reference, counts, rewards, options.beta)
            advantage = advantages(rewards).ravel()
            return policy_loss(log, reference, counts, advantage, options.beta)

        updates, state = tx.update(jax.grad(loss)(adapters), state)
        return optax.apply_updates(adapters, updates), state

    return step


def main() -> None:
    """Run the example."""
    options = parse()
    file = fetch.smollm()
    tokenizer, module = smollm.tokenizer(file), smollm.LanguageModel(layers=options.layers)
    params = smollm.load(file, options.layers)
    asked, held_out = read(tokenizer, options.seed, 500, options.held_out)
    fn = jaxlora.lora(module.apply, strict=True)
    config = jaxlora.LoRAConfig(rank=1, alpha=2, targets=("query", "value", "gate", "up", "down"))
    first, key = jax.random.split(jax.random.key(options.seed))
    tokens = np.zeros((1, 8), np.int32)
    adapted = jaxlora.init(first, module.apply, params, tokens, config=config)
    base, adapters = jaxlora.split(adapted)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(options.rate))
    state = tx.init(adapters)
    step = training_step(options, fn, tx, tokenizer.token_to_id(smollm.END))

    def rewards_held_out(params):
        for now in (key, None):  # drawn as in training, and the likeliest
            found = smollm.generate(params, fn, prompts(tokenizer, held_out), DRAWN, module, now)
            yield rewards(tokenizer, held_out, np.asarray(found)).mean()

    before = list(rewards_held_out(base))
    rng, mean = np.random.default_rng(options.seed), []
    bar = tqdm(range(options.steps), desc="training")
    for i in bar:
        chosen = [asked[j] for j in rng.choice(len(asked), options.questions, replace=False)]
        repeated = [question for question in chosen for _ in range(options.samples)]
        prompt, now = prompts(tokenizer, repeated), jax.random.fold_in(key, i)
        drawn = smollm.generate(jaxlora.bind(base, adapters), fn, prompt, DRAWN, module, now)
        reward = rewards(tokenizer, repeated, np.asarray(drawn)).reshape(-1, options.samples)
        adapters, state = step(adapters, state, base, prompt, drawn, reward)
        mean.append(reward.mean())
        bar.set_postfix(reward=f"{np.mean(mean[-10:]):.2f}")
    after = rewards_held_out(jaxlora.bind(base, adapters))
    trained = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    print(f"{trained:,} parameters trained; mean rewards:")
    first_ten, last_ten = np.mean(mean[:10]), np.mean(mean[-10:])
    print(f"drawn in training: {first_ten:.2f} in the first ten steps, {last_ten:.2f} in the last")
    for name, first, last in zip(("drawn", "likeliest"), before, after, strict=True):
        print(f"held out, {name} answers: {first:.2f} before, {last:.2f} after")


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=40, help="default %(default)s")
    add("--questions", type=int, default=4, help="of a step, default %(default)s")
    add("--samples", type=int, default=4, help="answers to each, default %(default)s")
    add("--rate", type=float, default=3e-3, help="default %(default)s")
    add("--loss", choices=BETAS, default="reinforce", help="default %(default)s")
    add("--beta", type=float, help=f"of the divergence, default {BETAS}")
    add("--held-out", type=int, default=128, help="questions, default %(default)s")
    add("--layers", type=int, default=30, help="use the first ones, for a look")
    add("--seed", type=int, default=0, help="of questions, factors and draws")
    options = parser.parse_args()
    if options.beta is None:
        options.beta = BETAS[options.loss]
    if options.samples < 2:
        parser.error(f"--samples must be 2 or more, to be compared: got {options.samples}")
    return options


if __name__ == "__main__":
    main()
