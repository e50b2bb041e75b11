"""Let `flax.serialization` write and read trees with adapted weights.

Flax looks the type of a node up in a registry of its own. To import Flax for that would take as
long as this library does, which may be used without it. So the nodes are registered at once if
Flax is there already, and else as soon as it is imported.

The state of a node is a dict of its arrays. What is static of it (roles, alpha, the base of
adapters) is that of the target, as everywhere in Flax.
"""

import dataclasses
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.types import Leaf, Leaves
from jaxlora.weights.adapters import Adapter, Replacement
from jaxlora.weights.nodes import LoRAWeight, TrainedLeaf
from jaxlora.weights.quantized import QuantizedWeight

_FLAX = "flax.serialization"


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the nodes when Flax is imported, and is gone then."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        del path, target
        if fullname != _FLAX:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                _register(module)

            spec.loader.exec_module = exec_module
        return spec


def _register(flax: Any) -> None:
    """Enter the nodes in the registry of the module `flax.serialization`."""

    def to_state(node):
        return {name: flax.to_state_dict(_plain(x)) for name, x in _arrays(node).items()}

    def from_state(target, state):
        arrays = _arrays(target)
        if set(state) != set(arrays):
            raise ValueError(
                f"the state of the {type(target).__name__} at {flax.current_path()!r} must hold "
                f"{sorted(arrays)}: got {sorted(state)}"
            )
        read = {n: flax.from_state_dict(_plain(x), state[n], name=n) for n, x in arrays.items()}
        for name, x in arrays.items():
            wanted, got = getattr(_plain(x), "shape", None), getattr(read[name], "shape", None)
            if wanted != got:
                raise ValueError(
                    f"the state {name!r} of the {type(target).__name__} at "
                    f"{flax.current_path()!r} must have the shape {wanted}: got {got}"
                )
            if _is_key(x):
                data = jnp.asarray(read[name])
                read[name] = jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return dataclasses.replace(target, **read)

    for kind in (LoRAWeight, Adapter, TrainedLeaf, Replacement, QuantizedWeight):
        flax.register_serialization_state(kind, to_state, from_state, override=True)


def _arrays(node: Leaf) -> Leaves:
    """Return what is not static of a node, by name."""
    fields = [f.name for f in dataclasses.fields(node) if not f.metadata.get("static")]
    return {name: x for name in fields if (x := getattr(node, name)) is not None}


def _is_key(x: Leaf) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Leaf) -> Leaf:
    """Return the bits of random keys, which NumPy has no dtype for, and else the same."""
    return jax.random.key_data(x) if _is_key(x) else x


if _FLAX in sys.modules:
    _register(sys.modules[_FLAX])
else:
    sys.meta_path.insert(0, _WhenImported())
