"""Compile without optimizing: each program is compiled several times and runs once."""

import pytest


@pytest.fixture(autouse=True)
def fast(compile_fast):
    pass
