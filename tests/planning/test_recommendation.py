"""What is recommended, against the rules and the numbers of papers."""

import dataclasses
import math

import pytest

import jaxlora
from jaxlora.planning import RULES, Rules, count, recommend

pytestmark = pytest.mark.once


def decoder(layers, width, hidden):
    """Return the shapes of all linear layers of a Llama."""
    square = {name: (layers, width, width) for name in "qkvo"}
    gated = {name: (layers, width, hidden) for name in ("gate", "up", "down")}
    return square | gated


@pytest.mark.parametrize(
    ("parameters", "shapes", "wanted"),
    [
        (6_738_415_616, decoder(32, 4096, 11008), 2_498_560),  # Llama 7B
        (13_015_864_320, decoder(40, 5120, 13824), 3_911_680),  # Llama 13B
    ],
)
def test_parameters_of_a_rank_are_those_of_decoders(parameters, shapes, wanted):
    assert count(shapes, 1) == wanted
    assert RULES.per_rank(parameters) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("task", ["simple", "medium", "complex"])
@pytest.mark.parametrize(("parameters", "column"), [(1e8, 0), (8e9, 0), (13e9, 1), (4e11, 2)])
def test_rank_is_that_of_task_and_size(task, parameters, column):
    found = recommend(parameters=parameters, examples=5000, task=task)
    assert found.rank.value == RULES.ranks[task][column]
    assert task in found.rank.reason
    assert "practice" in found.rank.source


@pytest.mark.parametrize(
    ("examples", "factor"), [(999, 0.5), (1000, 1), (10_000, 1), (10_001, 2), (None, 1)]
)
def test_rank_goes_with_the_examples(examples, factor):
    found = recommend(parameters=7e9, examples=examples, tokens=1e6)
    assert found.rank.value == factor * 16


def test_rate_is_ten_times_that_of_full_fine_tuning():
    # arXiv:2305.14314, appendix B: 2e-4 for 7B and 13B, 1e-4 for 33B and 65B
    rates = {size: recommend(parameters=size, examples=1).learning_rate for size in (7e9, 65e9)}
    assert {size: choice.value for size, choice in rates.items()} == {7e9: 2e-4, 65e9: 1e-4}
    assert rates[7e9].reason == "about 10 times the 2e-05 of full fine-tuning"


@pytest.mark.parametrize("tokens", [1, 1e6, 1e8, 1e10])
def test_capacity_is_the_least_rank_that_holds_the_data(tokens):
    found = recommend(parameters=7e9, tokens=tokens)
    each = 2 * 7e9 ** (2 / 3) / 1.42  # bits of factors of rank 1
    assert found.capacity.value == max(1, math.ceil(tokens / each))
    exceeds = tokens > found.rank.value * each
    assert ("which is more" in found.capacity.reason) == exceeds
    assert f"rank {found.capacity.value:,} would" in found.capacity.reason


def test_capacity_is_unknown_without_tokens():
    found = recommend(parameters=7e9, examples=1)
    assert found.capacity.value is None
    assert "unknown" in str(found)


def test_config_is_of_what_is_recommended():
    found = recommend(parameters=70e9, examples=20_000, task="complex")
    config = jaxlora.LoRAConfig(rank=128, alpha=32.0, targets="all-linear")
    assert found.config() == config


def test_table_has_every_choice_with_its_source():
    found = recommend(parameters=7e9, examples=500, tokens=1e9)
    for field in dataclasses.fields(found):
        choice = getattr(found, field.name)
        for text in (str(choice.value), choice.reason, choice.source):
            assert text in str(found)


def test_rules_can_be_replaced():
    ranks = {"simple": (1,), "medium": (3,), "complex": (5,)}
    mine = Rules(sizes=(1e9,), ranks=ranks, full_rates=(1e-3,), targets=("q",), rank_step=3)
    found = recommend(parameters=7e9, examples=1, rules=mine)
    assert (found.rank.value, found.learning_rate.value) == (1, 1e-2)
    assert (found.targets.value, found.targets.reason) == (("q",), "as the rules say")


def test_rules_cannot_be_changed_in_place():
    with pytest.raises(TypeError):
        RULES.ranks["simple"] = (1, 1, 1)  # pyright: ignore
    with pytest.raises(dataclasses.FrozenInstanceError):
        RULES.alpha = 1.0  # pyright: ignore


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "tokens or examples of the data must be given: got neither"),
        ({"tokens": 0}, "tokens must be finite and at least 1: got 0"),
        ({"examples": 1.5}, "examples must be an int: got 1.5"),
        ({"examples": 1, "parameters": "7B"}, "parameters must be a number: got '7B'"),
        ({"examples": 1, "task": "hard"}, r"task must be one of \('simple', .* got 'hard'"),
        ({"examples": 1, "rules": {}}, "rules must be a jaxlora.planning.Rules: got dict"),
    ],
)
def test_what_cannot_be_recommended_is_told(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        recommend(**{"parameters": 7e9} | settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alpha": 0}, "alpha must be finite and positive: got 0"),
        ({"rank_step": 0}, "rank_step must be at least 1: got 0"),
        ({"sizes": ()}, r"sizes must be positive numbers, one for each of sizes: got \(\)"),
        ({"full_rates": (1e-3,)}, "full_rates must be positive numbers, one for each of sizes"),
        ({"ranks": {"simple": (1, 1, 1)}}, r"ranks must have .*: \['medium', 'complex'\] are"),
        ({"ranks": 8}, "ranks must be a mapping from names: got 8"),
        ({"sources": {}}, "sources must have .* are missing"),
        (
            {"ranks": {"simple": (1.5, 1, 1), "medium": (1, 1, 1), "complex": (1, 1, 1)}},
            r"a rank in ranks\['simple'\] must be an int: got 1.5",
        ),
    ],
)
def test_rules_that_are_none_are_told(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        dataclasses.replace(RULES, **change)
