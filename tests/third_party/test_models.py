"""The laws of `test_laws` on models whose authors know nothing of jaxlora."""

import importlib

import jax
import pytest
from test_laws import (
    test_explain_finds_every_use_low_rank,
    test_fresh_adapters_leave_the_output_equal,
    test_low_rank_gradients_equal_merged,
    test_low_rank_output_equals_merged,
    test_merge_then_unmerge_gives_the_base_back,
    test_saved_adapters_load_bit_equal,
)

from third_party.base import MODELS

pytestmark = pytest.mark.once

__all__ = [
    "test_explain_finds_every_use_low_rank",
    "test_fresh_adapters_leave_the_output_equal",
    "test_low_rank_gradients_equal_merged",
    "test_low_rank_output_equals_merged",
    "test_merge_then_unmerge_gives_the_base_back",
    "test_saved_adapters_load_bit_equal",
]

LIBRARIES = ("equinox", "haiku", "keras", "ott", "penzai", "timesfm")


def models_of(library):
    """Return the models of a library, or one that is skipped where it is not installed."""
    try:
        importlib.import_module(f"third_party.models_{library}")
    except pytest.skip.Exception as skipped:
        return [pytest.param(None, id=library, marks=pytest.mark.skip(reason=str(skipped)))]
    return [pytest.param(make, id=name) for name, make in MODELS[library].items()]


def pytest_generate_tests(metafunc):
    models = [param for library in LIBRARIES for param in models_of(library)]
    metafunc.parametrize("make", models)
    if "compile" in metafunc.fixturenames:
        metafunc.parametrize("compile", [jax.jit], ids=["jit"])
