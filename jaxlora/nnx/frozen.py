"""Frozen weights of a module: variables that no filter for parameters selects.

Filters select variables by type. In an adapted module the factors alone are of type
`flax.nnx.Param`; the parameters of the module itself are held as `Frozen`, each with the type it
had, and get that type back for the time of a call.
"""

from typing import TypeVar

import jax
from flax import nnx

from jaxlora.types import Leaf, PyTree

N = TypeVar("N")
_TYPE = "param_type"  # metadata of a frozen variable: the type that it had


class Frozen(nnx.Variable[jax.Array]):
    """A parameter of the module beneath an `Adapted`, which is not trained.

    It holds the array and the metadata of the parameter, such as the names of its sharding, and
    as the metadata ``param_type`` the type of the parameter: `flax.nnx.Param` or a subclass.
    """


def freeze(nodes: N) -> N:
    """Return a copy of modules, with shared arrays, whose parameters are `Frozen`.

    Variables that several modules of nodes share are shared in the copy.
    """
    return nnx.map(lambda _, leaf: _frozen(leaf), nodes)


def restore(state: PyTree) -> PyTree:
    """Return a state whose `Frozen` variables have the types of the parameters again."""
    return nnx.map_state(lambda _, leaf: _restored(leaf), state)


def _frozen(leaf: Leaf) -> PyTree:
    """Return a copy of a variable, `Frozen` in the place of a parameter."""
    if not isinstance(leaf, nnx.Variable):
        return leaf
    copy = leaf.copy()
    if not isinstance(leaf, nnx.Param):
        return copy
    return Frozen.from_metadata(copy.get_raw_value(), copy.get_metadata() | {_TYPE: leaf.type})


def _restored(leaf: Leaf) -> PyTree:
    """Return a parameter in the place of a `Frozen` variable."""
    if not isinstance(leaf, Frozen):
        return leaf
    metadata = leaf.get_metadata()
    param_type = metadata.pop(_TYPE)
    return param_type.from_metadata(leaf.get_raw_value(), metadata)
