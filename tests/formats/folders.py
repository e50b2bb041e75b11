"""Folders of adapters that tests read and write."""

from pathlib import Path

import jax
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.formats import peft

GOLDEN = Path(__file__).parent.parent / "golden" / "peft"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def sites(program):
    return jaxlora.find_sites(program.fn, program.params, program.x)


def load(folder, program):
    return peft.load(folder, sites=sites(program), names=program.names)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(assert_array_equal, one, other)
