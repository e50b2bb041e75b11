"""Make every test strict: no silent promotion of dtypes or ranks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)
