"""Adapters of one value, to see which of several saves was read."""

import jax
import jax.numpy as jnp
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.weights import fingerprints
from jaxlora.weights.adapters import Adapter
from jaxlora.weights.roles import Roles

BASE = {"w": jnp.eye(4, 3), "v": jnp.ones((2, 5))}


def adapters(value):
    """Return adapters of which every element is a value."""

    def adapter(base):
        rows, columns = base.shape
        factors = jnp.full((rows, 2), value), jnp.full((2, columns), value)
        roles = Roles((), (0,), (1,))
        return Adapter(*factors, roles, 4.0, base.shape, fingerprints.take(base))

    return {name: adapter(base) for name, base in BASE.items()}


def value_at(path):
    """Return the value of adapters that were saved, after checking that all elements have it."""
    leaves = jax.tree.leaves(jaxlora.load_adapters(path, base=BASE))
    for leaf in leaves:
        assert_array_equal(leaf, leaves[0][0, 0])
    return float(leaves[0][0, 0])


def names(folder):
    return sorted(path.name for path in folder.iterdir())
