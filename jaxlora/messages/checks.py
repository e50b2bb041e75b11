"""Checks of arguments that many functions take, and warnings that point at the user's line.

A message says what is wrong with which argument, what is needed, what was got and what to do. Those
for trees are in `jaxlora.weights.tree_checks`; nothing here needs another file of this library.
"""

import math
import numbers
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_INSIDE = tuple(  # this library, and JAX where it traces what this library hands to it
    os.path.dirname(path) + os.sep for path in (os.path.dirname(__file__), jax.__file__)
)
_RANGES: Mapping[str, Callable[[float], bool]] = MappingProxyType(
    {
        "finite": math.isfinite,
        "finite and positive": lambda x: 0 < x < math.inf,
        "finite and not negative": lambda x: 0 <= x < math.inf,
        "finite and at least 1": lambda x: 1 <= x < math.inf,
        "in [0, 1)": lambda x: 0 <= x < 1,
        "in (0, 1]": lambda x: 0 < x <= 1,
    }
)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside of this library that called into it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def shown(value: object) -> str:
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
        article = "a traced" if isinstance(value, Tracer) else "an"
        return f"{article} array of shape {value.shape}, {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__!r}"
    if (kind := _flax_kind(value)) is not None:
        return f"the {kind} module {type(value).__name__!r}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__!r}"
    return type(value).__name__


def _flax_kind(value: object) -> str | None:
    """Return "Linen" or "NNX" for a module of Flax, which is not imported for it."""
    for kind, package in (("Linen", "flax.linen."), ("NNX", "flax.nnx.")):
        classes = type(value).__mro__
        if any(c.__module__.startswith(package) and c.__name__ == "Module" for c in classes):
            return kind
    return None


def is_function(fn: object) -> bool:
    """Tell whether this can be called, and is neither a class nor a module of Flax."""
    return callable(fn) and not isinstance(fn, type) and _flax_kind(fn) is None


def check_function(fn: object, order: str, name: str = "fn") -> None:
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


def check_key(key: object, order: str) -> None:
    """Raise if this is not one random key, typed or of the old kind."""
    if isinstance(key, jax.Array | np.ndarray):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == (0 if is_typed else 1) and (is_typed or key.dtype == jnp.uint32):
            return
    raise TypeError(
        f"key must be one random key: got {shown(key)}; make one with jax.random.key(0); "
        f"the order is {order}"
    )


def check_config(config: object, kind: type) -> None:
    """Raise if a config is of another kind."""
    if not isinstance(config, kind):
        name = f"jaxlora.{kind.__name__}"
        raise TypeError(f"config must be a {name}: got {shown(config)}; make one with {name}(...)")


def check_flag(value: object, name: str) -> bool:
    """Return a bool, or raise for what is none."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False: got {shown(value)}")
    return bool(value)


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Raise if this is none of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}: got {shown(value)}")


def check_count(value: object, name: str, least: int = 1) -> int:
    """Return an int that is not too small, or raise for what is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int: got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}: got {value}")
    return int(value)


def check_number(value: object, name: str, needed: str = "") -> float:
    """Return a real number, or raise for what is none, or not as is needed."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number: got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if needed and not _RANGES[needed](number):
        raise ValueError(f"{name} must be {needed}: got {value}")
    return number


def check_numbers(values: Any, name: str) -> list[float]:
    """Return finite numbers, also those of an array, or raise for what is none."""
    if not is_listing(values) or isinstance(values, Set | Tracer):
        raise TypeError(f"{name} must be numbers in order: got {shown(values)}")
    plain = [x.item() if _is_real(x) and not isinstance(x, Tracer) else x for x in values]
    return [check_number(x, f"{name}[{i}]", "finite") for i, x in enumerate(plain)]


def check_scalar(value: object, name: str) -> None:
    """Raise if this is no finite number and no scalar array of one, which may be traced."""
    if isinstance(value, jax.Array | np.ndarray) and value.ndim:
        raise ValueError(f"{name} must be a scalar: got {shown(value)}")
    if not _is_real(value):
        check_number(value, name, "finite")


def _is_real(value: Any) -> bool:
    """Tell whether this is an array of one real number."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic) and not value.ndim
    return is_array and any(jnp.issubdtype(value.dtype, k) for k in (jnp.floating, jnp.integer))


def check_dtype(dtype: object, name: str) -> None:
    """Raise if this is no floating dtype."""
    needed = f"{name} must be floating, as jnp.float32 or 'bfloat16'"
    if not isinstance(dtype, str | type | np.dtype):
        raise TypeError(f"{needed}: got {shown(dtype)}")
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError as error:
        raise ValueError(f"{needed}: got {dtype!r}, which is the name of none") from error
    if not is_floating:
        raise ValueError(f"{needed}: got {dtype}")


def is_listing(values: object) -> bool:
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
