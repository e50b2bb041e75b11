"""The description in a checkpoint of adapters: what earlier versions wrote, and what is damaged."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.weight import Roles

GOLDEN = Path(__file__).parent / "golden"


def grid(*shape, start=0, step=1 / 32):
    """Return an array of consecutive multiples of a power of two, which are exact."""
    return (np.arange(start, start + np.prod(shape), dtype=np.float32) * step).reshape(shape)


BASE = {
    "mlp": grid(4, 3, step=1 / 8),
    "qkv": grid(4, 6, step=1 / 16),
    "norm": grid(4, 5, step=1 / 4),
    "embed": grid(5, 2, step=1),
}
FACTORS = {
    "mlp": {"a": grid(4, 2, start=1), "b": grid(2, 3, start=2)},
    "qkv[:, 2:6]": {"a": grid(4, 1, start=3), "b": grid(1, 4, start=4)},
    "norm": {"a": grid(4, 2, start=5), "b": grid(2, 5, start=6), "magnitude": grid(5, start=7)},
    "embed": {"value": grid(2, 2, start=8)},
}
ALPHAS = {"mlp": 16.0, "qkv[:, 2:6]": 2.5, "norm": 8.0}


def assert_golden(adapters):
    """Check every value and static field of the adapters that the golden checkpoints hold."""
    assert set(adapters) == set(FACTORS)
    for name, factors in FACTORS.items():
        for field, value in factors.items():
            assert_array_equal(getattr(adapters[name], field), value, strict=True)
    for name, alpha in ALPHAS.items():
        assert adapters[name].alpha == alpha
        assert adapters[name].roles == Roles((), (0,), (1,))
    assert adapters["mlp"].magnitude is adapters["qkv[:, 2:6]"].magnitude is None
    assert adapters["embed"].rows == (1, 3)


@pytest.mark.parametrize("version", [1])
def test_checkpoints_of_earlier_formats_load(version):
    path = GOLDEN / f"adapters_format_{version}"
    assert_golden(jaxlora.load_adapters(path, base=BASE))
