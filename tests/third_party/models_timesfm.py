"""TimesFM, a forecaster of time series in Flax NNX with scanned layers, at a small size."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, normal
from flax import nnx

from third_party.base import EVERY_WEIGHT, drawn, model

flax_model: Any = pytest.importorskip(
    "timesfm.timesfm_2p5.timesfm_2p5_flax", reason="timesfm or einshape is not installed"
)
base: Any = pytest.importorskip("timesfm.timesfm_2p5.timesfm_2p5_base")
util: Any = pytest.importorskip("timesfm.flax.util")


def small():
    """Return the definition of the released model with other sizes."""
    released = base.TimesFM_2p5_200M_Definition()
    layers = released.stacked_transformers
    transformer = dataclasses.replace(layers.transformer, model_dims=8, hidden_dims=12, num_heads=2)
    sizes = {"input_dims": 8, "hidden_dims": 12}
    return dataclasses.replace(
        released,
        input_patch_len=4,
        output_patch_len=8,
        tokenizer=dataclasses.replace(released.tokenizer, output_dims=8, **sizes),
        stacked_transformers=dataclasses.replace(layers, num_layers=3, transformer=transformer),
        output_projection_point=dataclasses.replace(
            released.output_projection_point, output_dims=20, **sizes
        ),
        output_projection_quantiles=dataclasses.replace(
            released.output_projection_quantiles, output_dims=20, **sizes
        ),
    )


@model
def timesfm_forecaster():
    class Forecaster(flax_model.TimesFM_2p5_200M_flax_module):
        config = small()

    graphdef, state = nnx.split(Forecaster())

    def fn(state, series, mask):
        counts = jnp.zeros((3, 2), jnp.int32)
        keys = jnp.zeros((3, 2, 5, 2, 4))
        cache = util.DecodeCache(next_index=counts, num_masked=counts, key=keys, value=keys)
        return nnx.merge(graphdef, state)(series, mask, cache)

    mask = np.zeros((2, 5, 4), bool)
    mask[0, :2] = True
    args = (normal(1, 2, 5, 4), jnp.asarray(mask))
    return Case(fn, drawn(state), args, targets=EVERY_WEIGHT)
