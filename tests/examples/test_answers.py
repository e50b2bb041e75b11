"""Answers, their judges, and what REINFORCE makes of rewards, against plain definitions."""

import itertools

import answers
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import questions
import reinforce
import smollm
from soak import small_run

pytestmark = pytest.mark.once

needs_smollm = pytest.mark.skipif(
    not fetch.has(fetch.SMOLLM_GGUF), reason="SmolLM2 is not in the cache"
)
MODEL, ROWS = small_run.model_and_rows()
predict = jax.jit(small_run.TINY.apply)


@pytest.fixture(scope="module")
def tokenizer():
    return smollm.tokenizer(fetch.smollm())


def losses(rows):
    """Return the loss of each token of the answers, in NumPy."""
    logits = np.asarray(predict(MODEL.params, rows.tokens), np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [-log[i, j - 1, rows.tokens[i, j]] for i, j in zip(*rows.mask.nonzero(), strict=True)]


def test_judge_gives_the_mean_loss_of_the_answers_tokens():
    rows = ROWS.take(slice(24))
    score = answers.judge(predict, MODEL.params, rows)
    assert score.loss == pytest.approx(np.mean(losses(rows)), rel=1e-5)
    with pytest.raises(ValueError, match="batch must divide the number of rows, 24: got 7"):
        answers.judge(predict, MODEL.params, rows, 7)


def test_an_answer_is_exact_if_generation_gives_it():
    prompt = ROWS.tokens[:6, :5]
    said = smollm.generate(MODEL.params, small_run.TINY.apply, prompt, 4, small_run.TINY)
    tokens = np.concatenate([prompt, said], 1)
    mask = np.tile(np.arange(9) >= 5, (6, 1))
    wrong = tokens.copy()
    wrong[::2, -1] = (wrong[::2, -1] + 1) % small_run.TINY.vocabulary
    for given, right in ((tokens, [True] * 6), (wrong, [False, True] * 3)):
        found = answers.exact(predict(MODEL.params, given), answers.Answers(given, mask))
        assert found.tolist() == right


def test_rows_are_cut_to_what_one_of_them_needs():
    for chosen in ([0], [0, 1, 2, 3]):
        rows = ROWS.take(chosen)
        cut = answers.cut(rows)
        assert cut.tokens.shape[1] in (8, 16)
        assert cut.mask.sum() == rows.mask.sum()
        np.testing.assert_array_equal(cut.tokens, rows.tokens[:, : cut.tokens.shape[1]])


@needs_smollm
def test_prompts_are_no_answers_and_answers_end(tokenizer):
    pairs = [("One:", " two"), ("A longer prompt:", " x")]
    rows = answers.encoded(tokenizer, pairs, 12)
    for row, mask, (prompt, answer) in zip(*rows, pairs, strict=True):
        said = tokenizer.decode(row[mask].tolist(), skip_special_tokens=False)
        assert said == answer + smollm.END
        assert tokenizer.decode(row[: mask.argmax()].tolist()) == prompt
    with pytest.raises(ValueError, match=r"at most 4 tokens: 'A longer prompt:' needs \d"):
        answers.encoded(tokenizer, pairs, 4)


@pytest.mark.parametrize("family", questions.SETTINGS)
def test_questions_are_kept_apart_and_their_answers_are_right(family):
    train, held_out = questions.read(family, 0, 300, 40)
    assert (len(train), len(held_out)) == (300, 40)
    assert not {q.text for q in train} & {q.text for q in held_out}
    assert len({q.text for q in held_out}) == 40
    assert questions.read(family, 0, 300, 40) == (train, held_out)
    assert questions.read(family, 1, 300, 40)[1] != held_out
    for question in held_out[:5]:
        assert questions.reward(family, question, question.answer) == 1
        assert questions.reward(family, question, "no") < 0.5


def test_arithmetic_has_the_answer_that_python_gives():
    for question in questions.read("basic_arithmetic", 0, 50, 50)[1]:
        asked = question.text.removeprefix("Calculate ").removesuffix(".")
        assert float(question.answer) == eval(asked)


def test_advantages_leave_out_the_answer_itself():
    rewards = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5]], np.float32)
    found = reinforce.advantages(jnp.asarray(rewards))
    for i, j in itertools.product(range(2), range(3)):
        others = np.delete(rewards[i], j)
        assert found[i, j] == pytest.approx(rewards[i, j] - others.mean())


def test_tokens_count_up_to_the_first_end():
    drawn = jnp.array([[5, 2, 7, 2], [2, 1, 1, 1], [3, 4, 5, 6]])
    found = reinforce.up_to_end(drawn, 2)
    assert found.tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, True],
    ]


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradient_is_that_of_the_expected_reward_less_the_divergence(beta):
    """Weighted by their probabilities, all answers of one token have the exact gradient."""
    rng = np.random.default_rng(0)
    logits, other = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    reward = jnp.asarray(rng.uniform(size=5), jnp.float32)
    reference = jax.nn.log_softmax(other)

    def objective(logits):
        log = jax.nn.log_softmax(logits)
        return (jnp.exp(log) * (reward - beta * (log - reference))).sum()

    def loss(logits, i):
        log = jax.nn.log_softmax(logits)
        counts = jnp.ones((1, 1), bool)
        return reinforce.policy_loss(
            log[i][None, None], reference[i][None, None], counts, reward[i][None], beta
        )

    found = sum(jax.nn.softmax(logits)[i] * jax.grad(loss)(logits, i) for i in range(5))
    np.testing.assert_allclose(-found, jax.grad(objective)(logits), atol=1e-6)


def test_pairs_are_those_of_one_question_with_unequal_rewards():
    rng = np.random.default_rng(0)
    log, reference = jnp.asarray(-rng.uniform(0, 3, (2, 6, 3)), jnp.float32)
    counts = jnp.asarray(np.arange(3) < rng.integers(1, 4, 6)[:, None])
    rewards = jnp.array([[1.0, 0.0, 0.3], [0.5, 0.5, 0.5]])
    away = [(log[i] - reference[i])[counts[i]].sum() for i in range(6)]
    pairs = [(0, 1), (0, 2), (2, 1)]  # of the first question, the better first
    expected = np.mean([np.log1p(np.exp(-0.1 * (away[i] - away[j]))) for i, j in pairs])
    found = reinforce.pairs_loss(log, reference, counts, rewards, 0.1)
    assert found == pytest.approx(expected, rel=1e-5)
    equal = jnp.ones_like(rewards)
    assert reinforce.pairs_loss(log, reference, counts, equal, 0.1) == 0
