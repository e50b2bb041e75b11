"""Rows of an embedding that are trained themselves."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from numpy.testing import assert_allclose

import jaxlora
import jaxlora.nnx
from jaxlora.weights import Replacement


def moved(params, by=0.1) -> Any:
    """Return the base, and adapters all of whose elements have moved."""
    base, adapters = jaxlora.split(params)
    return base, jax.tree.map(lambda x: x + by, adapters)


VOCABULARY = {"embedding": normal(0, 10, 6), "w": normal(1, 6, 4)}

IDS = jnp.array([[1, 7, 7], [9, 0, 2]])


def tied(params, ids):
    return params["embedding"][ids] @ params["w"] @ params["w"].T @ params["embedding"].T


def rows_of(**config) -> Any:
    config = jaxlora.LoRAConfig(
        **{"rank": 2, "targets": ("w",), "rows": {"embedding": (7, 1)}} | config
    )
    return jaxlora.init(jax.random.key(0), tied, VOCABULARY, IDS, config=config)


def test_rows_are_trained_and_others_stay(tmp_path):
    base, adapters = moved(rows_of())
    assert (adapters["embedding"].rows, adapters["embedding"].value.shape) == ((1, 7), (2, 6))
    jaxlora.save_adapters(tmp_path / "a", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "a", base=base)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    merged = jaxlora.merge(jaxlora.bind(base, loaded))
    wanted = np.array(VOCABULARY["embedding"])
    wanted[[1, 7]] += np.float32(0.1)
    assert_allclose(merged["embedding"], wanted, rtol=1e-6)

    def loss(adapters):
        return jnp.sum(jnp.tanh(jaxlora.lora(tied, strict=True)(jaxlora.bind(base, adapters), IDS)))

    def whole_loss(embedding):
        return jnp.sum(jnp.tanh(tied(merged | {"embedding": embedding}, IDS)))

    got: Any = jax.grad(loss)(adapters)["embedding"].value
    assert_allclose(got, jax.grad(whole_loss)(merged["embedding"])[jnp.array([1, 7])], rtol=1e-4)


def test_rows_that_are_not_there_are_refused():
    for config, message in [
        ({"rows": {"embedding": (10,)}}, r"'embedding' of shape \(10, 6\) has no row 10"),
        ({"rows": {"embedding": ()}}, r"rows\['embedding'\] must be indices from 0"),
        (
            {"rows": {"embeding": (1,)}},
            "'embeding' is to be trained, but is no leaf",
        ),
        ({"rows": {"w": (1,)}}, "'w' is to be trained, and 'w' is adapted"),
        ({"train": ("embedding",)}, "'embedding' is to be trained twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            rows_of(**config)
    with pytest.raises(TypeError, match=r"rows\['embedding'\] must be indices: got 1.5"):
        rows_of(rows={"embedding": (1.5,)})
    base, _ = jaxlora.split(rows_of())
    wrong = {"embedding": Replacement(jnp.ones((3, 6)), (10, 6), rows=(1, 7))}
    with pytest.raises(ValueError, match=r"the value of 'embedding' must have the shape \(2, 6\)"):
        jaxlora.bind(base, wrong)


def test_rows_are_told_with_the_shape_of_the_leaf():
    assert re.search(r"embedding +\(10, 6\) +itself +12 ", str(jaxlora.summary(rows_of())))
