"""What a case is, and the list of them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

import jaxlora


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A program, its parameters and inputs, and what to adapt; made once for all laws.

    Attributes:
        fn: the program, of the parameters and the inputs.
        params: its parameters.
        args: its other inputs.
        targets: as in `jaxlora.LoRAConfig`.
        tokens: rows that the factors of each target are applied to.
        compiled: whether an eager call compiles part of it, so that roundings may differ.
        rank: rank of the adapters.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    targets: Any = "all-linear"
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    compiled: bool = False
    rank: int = 2

    @property
    def config(self) -> jaxlora.LoRAConfig:
        return jaxlora.LoRAConfig(rank=self.rank, alpha=3.0, targets=self.targets)

    def init(self, key: Any) -> Any:
        """Return fresh adapted parameters, made once for each key where it has a value."""
        words = jax.random.key_data(key)
        if isinstance(words, Tracer):
            return self.fresh(key)
        return _init(self, tuple(words.tolist()))

    def fresh(self, key: Any) -> Any:
        """Return fresh adapted parameters, made for this call."""
        return jaxlora.init(key, self.fn, self.params, *self.args, config=self.config)

    def trained(self, key: Any) -> Any:
        """Return adapted parameters whose factors are of the size of the weights, as if trained."""
        base, adapters = jaxlora.split(self.init(key))
        return jaxlora.bind(base, trained(key, adapters))

    @property
    def epsilon(self) -> float:
        """Rounding unit of the coarsest dtype of the parameters and the result."""
        shapes = jax.tree.leaves((self.params, jax.eval_shape(self.fn, self.params, *self.args)))
        kinds = [x.dtype for x in shapes if jnp.issubdtype(x.dtype, jnp.floating)]
        return max(float(jnp.finfo(kind).eps) for kind in kinds)


@functools.cache
def _init(case: Case, words: tuple[int, ...]) -> Any:
    return case.fresh(jax.random.wrap_key_data(jnp.array(words, jnp.uint32)))


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Put a case on the list."""
    made = functools.cache(make)
    CASES[make.__name__] = made
    return made


def trained(key, adapters):
    """Return factors drawn so that the product is about as large as a weight, by no program."""
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key))).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape, scale=0.3), x.dtype), adapters)


def normal(seed, *shape, dtype=jnp.float32):
    x = np.random.default_rng(seed).normal(size=shape) / math.sqrt(shape[0] if shape else 1)
    return jnp.asarray(x, dtype)


def adapted(fn, params, *args, **config):
    """Return parameters with adapters that have moved from their start."""
    config = jaxlora.LoRAConfig(**{"rank": 2, "alpha": 3.0, **config})
    base, adapters = jaxlora.split(
        jaxlora.init(jax.random.key(0), fn, params, *args, config=config)
    )
    return jaxlora.bind(base, jax.tree.map(lambda x: x + 0.1, adapters))
