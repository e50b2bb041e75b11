"""Questions with one right answer, made by the generators of reasoning-gym, which also judge it.

Stojanovski et al. 2025, arXiv:2505.24760. A question that is held out is never trained on.
"""

import functools
from typing import Any, NamedTuple

from smollm import END

SETTINGS = {  # in reach of a small model, and short
    "spell_backward": {"min_word_len": 3, "max_word_len": 7},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
}


class Question(NamedTuple):
    """A question, its answer, and the entry of reasoning-gym that they are from."""

    text: str
    answer: str
    entry: dict

    @property
    def pair(self) -> tuple[str, str]:
        """The prompt and the answer, in the form that SmolLM2-Instruct was trained on.

        The answer begins for the model: without it, a sentence comes before the number.
        """
        return f"<|im_start|>user\n{self.text}{END}\n<|im_start|>assistant\nAnswer: ", self.answer


def read(
    family: str, seed: int, train: int, held_out: int
) -> tuple[list[Question], list[Question]]:
    """Return questions to train on, and others that are held out.

    Args:
        family: a key of `SETTINGS`.
        seed: decides which.
        train: number to train on.
        held_out: number held out.
    """
    apart = {question.text: question for question in _made(family, 2 * seed + 1, 2 * held_out)}
    kept = list(apart.values())[:held_out]
    texts = {question.text for question in kept}
    others = (question for question in _made(family, 2 * seed, 2 * train))
    return [q for q in others if q.text not in texts][:train], kept


def reward(family: str, question: Question, answer: str) -> float:
    """Return what reasoning-gym gives for an answer, 0 to 1."""
    return float(_dataset(family, 0, 1).score_answer(answer, question.entry))


@functools.lru_cache(maxsize=1)
def _dataset(family: str, seed: int, count: int) -> Any:
    import reasoning_gym  # takes seconds

    return reasoning_gym.create_dataset(family, size=count, seed=seed, **SETTINGS[family])


def _made(family: str, seed: int, count: int) -> list[Question]:
    made = _dataset(family, seed, count)
    return [Question(entry["question"], entry["answer"], entry) for entry in made]
