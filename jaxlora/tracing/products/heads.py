"""What is done to a product after it is split into heads, see `jaxprs.sums`."""

from collections.abc import Callable

import jax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.products.term import Gain, Scaled
from jaxlora.tracing.types import Eqn
from jaxlora.tracing.values import placement
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.scaling import times


def leave(
    run: Evaluation,
    eqn: Eqn,
    y: jax.Array,
    with_term: Callable[[jax.Array], jax.Array],
    weight: LowRank,
    gain: Gain | None,
    columns: jax.Array | None,
) -> bool:
    """Leave a low-rank term to be added after a split into heads; tell whether that can be.

    Args:
        run: the evaluation of the program.
        eqn: the product.
        y: the product with the base.
        with_term: adds the term to it, or to what it is split into.
        weight: the weight.
        gain: how the gain of the weight meets the product. If it scales the result, that is left
            too, and cannot be where something else is added before the split.
        columns: the gain.
    """
    if (split := run.known.splits.get(eqn)) is None:
        return False
    factor = None
    if gain is not None and columns is not None and gain.scaled is Scaled.RESULT:
        if split.is_of_sum or not gain.is_of_last or placement.explicit(y) is not None:
            return False
        shape = compat.shape(split.reshape.outvars[0])
        kept = y.ndim - 1
        factor = gain.of_last(columns, (*[1] * kept, *shape[kept:]))

    def change(y: jax.Array) -> jax.Array:
        y = with_term(y)
        with run.scope(weight):
            return y if factor is None else times(y, factor)

    run.late.setdefault(split.reshape, []).append(change)
    return True
