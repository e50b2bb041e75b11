"""What the examples read of WordNet."""

import re

import fetch
import numpy as np
import pytest
import reviews
import smollm
import wordnet
from tokenizers import Tokenizer

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(
        not fetch.has("data.noun"),
        reason="WordNet is not in the cache: call fetch.wordnet() in examples/ once",
    ),
]

needs_minilm = pytest.mark.skipif(
    not fetch.has("tokenizer.json"),
    reason="MiniLM's tokenizer is not in the cache: call fetch.minilm() in examples/ once",
)
needs_smollm = pytest.mark.skipif(
    not fetch.has(fetch.SMOLLM_GGUF),
    reason="SmolLM2 is not in the cache: call fetch.smollm() in examples/ once",
)


@pytest.fixture(scope="module")
def synsets():
    return wordnet.read_synsets()


@pytest.fixture(scope="module")
def path():
    return fetch.minilm()[1]


@pytest.fixture(scope="module")
def tokenizer():
    return smollm.tokenizer(fetch.smollm())


class TestSynsets:
    def test_are_as_many_as_wordnet_says(self, synsets):
        assert len(synsets) == 82_115  # man 7 wnstats
        assert len({word.lower() for synset in synsets for word in synset.words}) == 117_798

    def test_each_class_has_the_lines_of_its_file(self, synsets):
        assert len(wordnet.CLASSES) == 26
        files = re.findall(r"^\d{8} (\d\d) n", fetch.wordnet().read_text(), re.M)
        counts = [files.count(f"{i:02}") for i in range(3, 29)]
        assert sum(counts) == len(synsets)
        labels = [synset.label for synset in synsets]
        np.testing.assert_array_equal(np.bincount(labels, minlength=26), counts)

    def test_has_words_class_and_definition(self, synsets):
        (dog,) = (synset for synset in synsets if "domestic dog" in synset.words)
        assert dog.words == ("dog", "domestic dog", "Canis familiaris")
        assert wordnet.CLASSES[dog.label] == "animal"
        assert dog.gloss.endswith('; occurs in many breeds; "the dog barked all night"')
        assert dog.definition.startswith("a member of the genus Canis")
        assert dog.definition.endswith("; occurs in many breeds")

    @pytest.mark.parametrize(
        ("word", "name"),
        [("entity", "Tops"), ("happiness", "feeling"), ("photosynthesis", "process")],
    )
    def test_is_of_the_class_that_its_name_says(self, synsets, word, name):
        assert name in {wordnet.CLASSES[s.label] for s in synsets if word in s.words}


@needs_minilm
class TestGlosses:
    def test_are_four_to_one_and_the_same_for_a_seed(self, path):
        train, held_out = wordnet.read_glosses(path, 3, 500)
        assert train.tokens.shape == (400, reviews.LENGTHS[-1])
        assert held_out.tokens.shape == (100, reviews.LENGTHS[-1])
        again = wordnet.read_glosses(path, 3, 500)
        for one, other in zip((*train, *held_out), (*again[0], *again[1]), strict=True):
            np.testing.assert_array_equal(one, other)
        assert (wordnet.read_glosses(path, 4, 500)[0].tokens != train.tokens).any()

    def test_have_the_labels_of_their_synsets(self, path, synsets):
        tokenizer = Tokenizer.from_file(str(path))
        train, _ = wordnet.read_glosses(path, 0, 50)
        labels: dict[str, set[int]] = {}
        for synset in synsets:
            labels.setdefault(synset.gloss.lower(), set()).add(synset.label)
        texts = [tokenizer.decode(ids).replace(" ", "") for ids in train.tokens]
        packed = {text.replace(" ", ""): found for text, found in labels.items()}
        whole = [(text, i) for text, i in zip(texts, train.labels, strict=True) if text in packed]
        assert len(whole) > 30  # the others were cut, or have letters that the tokenizer changes
        assert all(label in packed[text] for text, label in whole)

    def test_are_put_into_batches_as_reviews_are(self, path):
        train, _ = wordnet.read_glosses(path, 0, 100)
        batch = next(reviews.training_batches(train, 8, seed=0))
        assert batch.tokens.shape[1] in reviews.LENGTHS
        labels = reviews.run_sorted(lambda _, tokens, mask: mask.sum(1), None, train, leave=False)
        np.testing.assert_array_equal(labels, train.mask.sum(1))


@needs_smollm
class TestDefinitions:
    def test_are_the_same_for_a_seed_and_have_no_word_in_both(self, tokenizer):
        parts = wordnet.read_definitions(tokenizer, 1, 300, 40)
        assert [x.tokens.shape for x in parts] == [(300, 24), (40, 24)]
        again = wordnet.read_definitions(tokenizer, 1, 300, 40)
        for one, other in zip(parts, again, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.mask, other.mask)
        texts = [tokenizer.decode(ids) for part in parts for ids in part.tokens]
        words = [text.partition("\n")[0].lower() for text in texts]
        assert len(set(words)) == 340

    def test_answer_the_prompt_and_end(self, tokenizer, synsets):
        known = {(s.words[0], f" {s.definition}{smollm.END}") for s in synsets}
        train, _ = wordnet.read_definitions(tokenizer, 2, 60, 0)
        for tokens, mask in zip(train.tokens, train.mask, strict=True):
            start, end = np.flatnonzero(np.diff(mask, prepend=False, append=False))
            decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
            word = re.fullmatch(r"Word: (.+)\nDefinition:", decode(tokens[:start]))
            assert word
            assert (word[1], decode(tokens[start:end])) in known
            assert set(tokens[end:]) <= {tokenizer.token_to_id(smollm.END)}

    def test_too_few_that_fit_are_an_error(self, tokenizer, synsets, monkeypatch):
        monkeypatch.setattr(wordnet, "read_synsets", lambda: synsets[:50])
        with pytest.raises(ValueError, match="too few definitions of 24 tokens: 51 are needed"):
            wordnet.read_definitions(tokenizer, 1, 50, 1)
