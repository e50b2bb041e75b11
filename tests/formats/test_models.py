"""Names of known models, against the trees and tensors that their libraries have."""

import json
import math
from pathlib import Path

import bert
import pytest

from jaxlora.formats import Names, models
from jaxlora.weights import blocks

TREES = json.loads((Path(__file__).parent.parent / "golden" / "trees.json").read_text())
NAMES = {
    "bert": models.BERT_FLAX,
    "gpt2": models.GPT2_FLAX,
    "gemma2": models.GEMMA,
    "gemma3": models.GEMMA,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_its_leaf(name):
    leaves, tensors = TREES[name]["leaves"], TREES[name]["tensors"]
    table = NAMES[name].table(leaves)
    by_name = {tensor.removesuffix(".weight"): shape for tensor, shape in tensors.items()}
    assert table.keys() == by_name.keys()
    assert {place.path for place in table.values()} == leaves.keys()
    for tensor, place in table.items():
        part = blocks.shape(place.part, tuple(leaves[place.path]))
        assert math.prod(part) == math.prod(by_name[tensor])


def test_a_model_within_another():
    names = models.BERT_FLAX.within(file="bert.", tree="params/bert/")
    table = names.table({"params/bert/pooler/dense/kernel": (4, 4), "params/head/kernel": (4, 2)})
    assert {name: str(place) for name, place in table.items()} == {
        "bert.pooler.dense": "params/bert/pooler/dense/kernel"
    }


def test_functions_within_another_model():
    pair = (
        lambda name: "kernel" if name == "out" else None,
        lambda path: ["out"] if path == "kernel" else [],
    )
    table = Names(pair).within(file="head.", tree="a/").table({"a/kernel": (4, 4), "kernel": (4,)})
    assert {name: place.path for name, place in table.items()} == {"head.out": "a/kernel"}


def test_names_are_printed_as_code_that_makes_them():
    again = eval(str(bert.NAMES), {"Names": Names})
    _, sites = bert.shapes_and_sites()
    assert again.table(sites.shapes) == bert.NAMES.table(sites.shapes)
