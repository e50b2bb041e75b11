"""WordNet's nouns: their glosses, each of one of 26 classes, and definitions to be told of words.

Fellbaum 1998. A line of the file is a synset: words that share a gloss, which is a definition and
examples. Its class is the file that the lexicographers kept it in.
"""

from pathlib import Path
from typing import NamedTuple

import answers
import fetch
import numpy as np
import reviews
from answers import Answers
from reviews import Sentences
from tokenizers import Tokenizer

CLASSES = (  # of nouns, in WordNet's order; Tops are the beginnings of the others
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
    *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state"),
    *("substance", "time"),
)


class Synset(NamedTuple):
    """Words of one meaning, the number of their class in `CLASSES`, and what they mean."""

    words: tuple[str, ...]
    label: int
    gloss: str

    @property
    def definition(self) -> str:
        """The gloss without its examples, which are in quotation marks."""
        return self.gloss.partition('; "')[0]


def read_synsets() -> list[Synset]:
    """Return all synsets of nouns, in WordNet's order."""
    lines = fetch.wordnet().read_text("ascii").splitlines()
    return [_synset(line) for line in lines if not line.startswith(" ")]  # the license is indented


def _synset(line: str) -> Synset:
    head, _, gloss = line.partition(" | ")
    _, file, _, count, *rest = head.split()
    words = tuple(word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2])
    return Synset(
        words, int(file) - 3, gloss.strip()
    )  # the files before are of adjectives, adverbs


def read_glosses(
    tokenizer_path: Path, seed: int, count: int | None = 16000
) -> tuple[Sentences, Sentences]:
    """Return training and held-out definitions with the numbers of their classes, four to one."""
    synsets = read_synsets()
    chosen = [synsets[i] for i in np.random.default_rng(seed).permutation(len(synsets))[:count]]
    texts = [synset.definition for synset in chosen]
    labels = np.array([synset.label for synset in chosen], np.int32)
    return reviews.divided(reviews.encoded(tokenizer_path, texts, labels))


def prompt(word: str) -> str:
    """Return what a definition of a word is the answer to."""
    return f"Word: {word}\nDefinition:"


def read_definitions(
    tokenizer: Tokenizer, seed: int, train: int = 5600, held_out: int = 96, length: int = 24
) -> tuple[Answers, Answers]:
    """Return definitions to train on and others, of other words, that are held out.

    They are of the first word of a synset, one for each word, and fit in the length as a whole.

    Args:
        tokenizer: of the language model.
        seed: decides which, and their order.
        train: number to train on.
        held_out: number held out.
        length: tokens of each, with prompt and padding.
    """
    synsets, found = read_synsets(), {}
    for i in np.random.default_rng(seed).permutation(len(synsets)):
        if len(found) == train + held_out:
            break
        word = synsets[i].words[0]
        if word.lower() in found:
            continue
        pair = prompt(word), f" {synsets[i].definition}"
        if answers.length(tokenizer, pair) <= length:
            found[word.lower()] = pair
    if len(found) < train + held_out:
        raise ValueError(
            f"too few definitions of {length} tokens: {train + held_out} are needed, "
            f"got {len(found)}"
        )
    rows = answers.encoded(tokenizer, [*found.values()], length)
    return rows.take(slice(held_out, None)), rows.take(slice(held_out))
