"""What makes a model of another library a case of the laws."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case

EVERY_WEIGHT = ".*"  # as targets: whatever a supported operation consumes, embeddings included
MODELS: dict[str, dict[str, Callable[[], Case]]] = {}


@contextlib.contextmanager
def relaxed():
    """Let other people's code promote dtypes and ranks; jaxlora itself stays held to strictness."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def model(make: Callable[[], Case]) -> Callable[[], Case]:
    """Put a model on the list of its library.

    It is made once, and jitted: operation by operation, the laws would take minutes.
    """

    @functools.cache
    @functools.wraps(make)
    def made():
        with relaxed():
            case = make()

        @jax.jit
        def fn(*args):
            with relaxed():
                return case.fn(*args)

        return dataclasses.replace(case, fn=fn, compiled=True)

    library = make.__module__.rpartition("models_")[2]
    MODELS.setdefault(library, {})[make.__name__] = made
    return made


def drawn(shapes):
    """Return parameters of these shapes, none of them zero.

    The initializers of the libraries compile for seconds, and a projection that starts at zero
    would hide whatever comes before it from the laws.
    """
    leaves, treedef = jax.tree.flatten(shapes)
    generator = np.random.default_rng(0)
    params = []
    for leaf in leaves:
        fan_in = math.prod(leaf.shape[:-1])
        mean = 0 if leaf.ndim > 1 else 0.5  # weights, or the scales and biases of vectors
        values = mean + generator.normal(size=leaf.shape) / math.sqrt(max(fan_in, 4))
        params.append(jnp.asarray(values, leaf.dtype))
    return treedef.unflatten(params)
