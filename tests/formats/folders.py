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


def adapted(fn, params, x, **config):
    """Return moved adapters, and where they can go."""
    config = jaxlora.LoRAConfig(rank=2, **config)
    tree = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    adapters = jaxlora.split(tree)[1]
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    return moved, jaxlora.find_sites(fn, params, x)
