"""The page for users of PEFT, against the ``LoraConfig`` that is installed."""

import dataclasses
import operator
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import jaxlora
import jaxlora.nnx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="install jaxlora[peft] to compare with PEFT")

PAGE = Path(__file__).parents[2] / "docs/coming_from/peft.md"
NAME = re.compile(r"`([a-z_.A-Z]+)`")


def section():
    """Return the text about the arguments of ``LoraConfig``."""
    found = re.search(r"## Every argument of `LoraConfig`\n(.*?)\n## ", PAGE.read_text(), re.S)
    assert found
    return found[1]


def rows():
    """Return the argument in PEFT and what is in the second column, for each row of the tables."""
    tables = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]*\|$", section(), re.M)
    return [(name, other.strip()) for name, other in tables]


def test_page_names_every_argument_of_peft_once():
    described = section().partition("### What a config says about itself")[2]
    plain = described.partition(": ")[2].partition(". ")[0]
    named = [name for name, _ in rows()] + NAME.findall(plain)
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(peft.LoraConfig))


def test_page_names_what_there_is():
    fields = {field.name for field in dataclasses.fields(jaxlora.LoRAConfig)}
    named = [(name, found) for name, other in rows() for found in NAME.findall(other)]
    assert len(named) > 15
    for _, found in named:
        if found not in fields:
            operator.attrgetter(found.removeprefix("jaxlora."))(jaxlora)
    missing = [name for name, other in rows() if not NAME.findall(other)]
    assert all(dict(rows())[name] in ("\N{EN DASH}", "not needed") for name in missing)


@pytest.mark.parametrize("start", re.findall(r'^\| `"(\w+)"` \| `"\w+"', PAGE.read_text(), re.M))
def test_page_names_starts_that_peft_has(start):
    peft.LoraConfig(init_lora_weights=start)
    ours: Any = {"gaussian": "normal"}.get(start, start)
    jaxlora.LoRAConfig(initializer=ours)
