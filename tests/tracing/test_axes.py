"""Axes of a weight through reshapes and transposes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.tracing.values import axes


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_axes_follow_any_reshape_and_transpose(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    dims = axes.from_shape(sizes, range(len(sizes)))
    index = np.indices(sizes)
    where = [index[i] for i in range(len(sizes))]  # of each element, its index along each axis
    for _ in range(data.draw(st.integers(1, 4))):
        shape = where[0].shape
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(shape))))
            dims, where = tuple(dims[d] for d in order), [w.transpose(order) for w in where]
        else:
            ones = [1] * len(shape) if len(shape) < 16 else []  # NumPy has at most 64 dimensions
            factors = data.draw(st.permutations([*shape, *ones]))
            new = axes.reshape(dims, factors)
            if new is None:
                continue
            dims, where = new, [w.reshape(factors) for w in where]
        assert axes.shape(dims) == where[0].shape
        for d, dim in enumerate(dims):
            along = np.moveaxis(np.stack(where), d + 1, 0)
            moves = {i for i in range(len(sizes)) if (along[1:, i] != along[:-1, i]).any()}
            assert moves <= axes.labels([dim])
