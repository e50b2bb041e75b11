"""Compile without optimizing: each program is compiled several times and runs once."""

import jax
import pytest


@pytest.fixture(autouse=True)
def compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
