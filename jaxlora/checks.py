"""Checks of arguments that many functions take, and warnings that point at the user's line.

A message says what is wrong with which argument, what is needed, what was got and what to do.
"""

import numbers
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import paths
from jaxlora.quantized import QuantizedWeight
from jaxlora.weight import Adapter, LoRAWeight, Replacement, TrainedLeaf

_PACKAGE = os.path.dirname(__file__) + os.sep


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of this library that called into it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def shown(value: Any) -> str:
    """Return a phrase for what was got in the place of something else.

    >>> import jax.numpy as jnp
    >>> shown(None), shown(3), shown({}), shown(jnp.ones(2)), shown(shown)
    ('None', '3', 'dict', 'an array of shape (2,), float32', "the function 'shown'")
    """
    if value is None:
        return "None"
    if isinstance(value, bool | numbers.Number | str | bytes):
        text = repr(value)
        return text if len(text) < 80 else f"{text[:77]}..."
    if isinstance(value, jax.Array | np.ndarray):
        return f"an array of shape {value.shape}, {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__!r}"
    if (kind := _flax_kind(value)) is not None:
        return f"the {kind} module {type(value).__name__!r}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__!r}"
    return type(value).__name__


def _flax_kind(value: Any) -> str | None:
    """Return "Linen" or "NNX" for a module of Flax, which is not imported for it."""
    for kind, package in (("Linen", "flax.linen."), ("NNX", "flax.nnx.")):
        classes = type(value).__mro__
        if any(c.__module__.startswith(package) and c.__name__ == "Module" for c in classes):
            return kind
    return None


def is_function(fn: Any) -> bool:
    """Tell whether this can be called, and is neither a class nor a module of Flax."""
    return callable(fn) and not isinstance(fn, type) and _flax_kind(fn) is None


def check_function(fn: Any, order: str, name: str = "fn") -> None:
    """Raise if this is no function of parameters; ``order`` shows the order of the arguments."""
    needed = f"{name} must be a function of the parameters: got {shown(fn)}"
    match _flax_kind(fn):
        case "Linen":
            raise TypeError(f"{needed}; pass its apply, as model.apply")
        case "NNX":
            raise TypeError(
                f"{needed}; use jaxlora.nnx.adapt, or pass a function of flax.nnx.state(model)"
            )
    if not is_function(fn):
        raise TypeError(f"{needed}; the order is {order}")


def check_key(key: Any, order: str) -> None:
    """Raise if this is not one random key, typed or of the old kind."""
    if isinstance(key, jax.Array | np.ndarray):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == (0 if is_typed else 1) and (is_typed or key.dtype == jnp.uint32):
            return
    raise TypeError(
        f"key must be one random key: got {shown(key)}; make one with jax.random.key(0); "
        f"the order is {order}"
    )


def check_config(config: Any, kind: type) -> None:
    """Raise if a config is of another kind."""
    if not isinstance(config, kind):
        name = f"jaxlora.{kind.__name__}"
        raise TypeError(f"config must be a {name}: got {shown(config)}; make one with {name}(...)")


def check_tree(params: Any, order: str) -> dict[str, Any]:
    """Return the leaves of a tree of weights by path, or raise if it has none."""
    leaves, _ = paths.flatten(params)
    if not leaves:
        raise ValueError(
            f"params is an empty tree: it must hold the weights of the program; got {shown(params)}"
        )
    if found := [path for path, leaf in leaves.items() if isinstance(leaf, Adapter | Replacement)]:
        raise TypeError(
            f"params must hold weights: got the adapter of {found[0]!r}; "
            "put adapters over their base with jaxlora.bind"
        )
    if not any(map(is_weight, leaves.values())):
        first = next(iter(leaves.values()))
        held = "" if first is params else f" of {shown(first)}"
        raise TypeError(
            f"params must be a tree of arrays: got {shown(params)}{held}; the order is {order}"
        )
    return leaves


def is_weight(leaf: Any) -> bool:
    """Tell whether a leaf is an array, the shape of one, or a node that stands for one."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSU"
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)  # a random key is none
    return isinstance(leaf, LoRAWeight | TrainedLeaf | QuantizedWeight)


def check_plain(leaves: dict[str, Any], name: str, *, with_values: bool = False) -> None:
    """Raise if a leaf is adapted or trained; with values, also if it is the shape of an array."""
    for path, leaf in leaves.items():
        if paths.is_trained(leaf):
            raise ValueError(f"the leaf {path!r} is adapted already: {name} needs a plain tree")
        if with_values and isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"the leaf {path!r} is the shape of an array: {name} needs its values")


def check_flag(value: Any, name: str) -> bool:
    """Return a bool, or raise for what is none."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False: got {shown(value)}")
    return bool(value)


def check_number(value: Any, name: str) -> float:
    """Return a real number, or raise for what is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number: got {shown(value)}")
    return float(value)


def is_listing(values: Any) -> bool:
    """Tell whether this holds several values in order, and is no string, mapping or scalar."""
    is_one = isinstance(values, str | bytes | Mapping) or getattr(values, "ndim", 1) == 0
    return isinstance(values, Iterable) and not is_one


def each_batch(batches: Any) -> Iterator[tuple[Any, ...]]:
    """Yield tuples of arguments, or raise for a batch that is none."""
    needed = "batches must be tuples, each of the arguments of a call after params"
    if not is_listing(batches):
        raise TypeError(f"{needed}: got {shown(batches)}; put them in a list, as [(x,)]")
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise TypeError(f"{needed}: got {shown(batch)} for one; put it in a tuple, as [(x,)]")
        yield tuple(batch)
