"""Adapters with no factor zero, and their dense products, computed by NumPy."""

from typing import Any

import jax
import numpy as np
from attention import PARAMS, X, model
from numpy.testing import assert_allclose

import jaxlora


def trained(seed, rank=2, alpha=3.0, targets: Any = "all-linear", base=PARAMS):
    """Return adapters with no factor zero, and their base."""
    config = jaxlora.LoRAConfig(rank=rank, alpha=alpha, targets=targets)
    params = jaxlora.init(jax.random.key(seed), model, base, X, config=config)
    base, adapters = jaxlora.split(params)
    keys = iter(jax.random.split(jax.random.key(seed + 100), 2 * len(adapters)))
    return base, jax.tree.map(lambda f: jax.random.normal(next(keys), f.shape), adapters)


def matrices(adapters):
    """Return each product as a stack of matrices, computed by NumPy."""
    found = {}
    for path, adapter in adapters.items():
        count = len(adapter.roles.stack)
        a, b = (np.asarray(factor, np.float64) for factor in (adapter.a, adapter.b))
        a = a.reshape(int(np.prod(a.shape[:count])), -1, adapter.rank)
        b = b.reshape(len(a), adapter.rank, -1)
        found[path] = adapter.alpha / adapter.rank * a @ b
    return found


def nearest(matrix, rank):
    """Return the nearest stack of matrices of a rank."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def assert_products(adapters, wanted, atol=1e-4):
    got = matrices(adapters)
    assert list(got) == list(wanted)
    for path in wanted:
        assert_allclose(got[path], wanted[path], rtol=1e-4, atol=atol, err_msg=path)


def of_each(function, *products):
    return {path: function(*(product[path] for product in products)) for path in products[0]}
