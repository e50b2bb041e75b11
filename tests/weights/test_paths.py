"""Paths of leaves."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from cases import normal
from cases.base import adapted
from numpy.testing import assert_allclose

import jaxlora

X = normal(1, 5, 8)


def test_fields_named_value_have_paths_of_their_own():
    @functools.partial(jax.tree_util.register_dataclass)
    @dataclasses.dataclass
    class Attention:
        query: jax.Array
        value: jax.Array

    params = {"attention": Attention(normal(0, 8, 6), normal(1, 8, 6))}

    def fn(params, x):
        return x @ params["attention"].query + x @ params["attention"].value

    sites = jaxlora.find_sites(fn, params, X)
    assert [site.path for site in sites] == ["attention/query", "attention/value"]


def test_boxes_add_nothing_to_a_path():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(6, kernel_init=kernel_init)
    variables = model.init(jax.random.key(0), X)
    sites = jaxlora.find_sites(model.apply, variables, X)
    assert [site.path for site in sites] == ["params/kernel"]
    params = adapted(model.apply, variables, X)
    got: Any = jaxlora.lora(model.apply)(params, X)
    wanted: Any = model.apply(jaxlora.merge(params), X)
    assert_allclose(got, wanted, atol=1e-5)
