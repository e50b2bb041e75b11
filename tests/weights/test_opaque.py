"""Nodes in the place of arrays: the error says what to call, and none becomes an array."""

import copy
import operator
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax import lax

import jaxlora

pytestmark = pytest.mark.once

X = normal(0, 2, 8)
PLAIN = {"w": normal(1, 8, 8), "scale": normal(2, 8)}


def model(params, x):
    return x @ params["w"] * params["scale"][None]


PARAMS: Any = jaxlora.init(
    jax.random.key(0),
    model,
    PLAIN,
    X,
    config=jaxlora.LoRAConfig(rank=2, targets=("w",), train=("scale",)),
)
ADAPTERS = jaxlora.split(PARAMS)[1]
QUANTIZED: Any = jaxlora.quantize(model, PLAIN, X, config=jaxlora.QuantizationConfig(block_size=4))
NODES = {
    "LoRAWeight": (PARAMS["w"], r"jaxlora.lora\(fn\).*jaxlora.merge\(params\)"),
    "TrainedLeaf": (PARAMS["scale"], r"jaxlora.lora\(fn\).*jaxlora.merge\(params\)"),
    "Adapter": (ADAPTERS["w"], r"jaxlora.bind\(base, adapters\)"),
    "Replacement": (ADAPTERS["scale"], r"jaxlora.bind\(base, adapters\)"),
    "QuantizedWeight": (QUANTIZED["w"], r"jaxlora.lora\(fn\).*jaxlora.dequantize\(params\)"),
}
ONES = np.ones((2, 8), np.float32)
USES = [
    lambda node: X @ node,
    lambda node: node @ X.T,
    lambda node: node * 2,
    lambda node: 2 * node,
    lambda node: X + node,
    lambda node: X.__lt__(node),
    operator.neg,
    float,
    lambda node: node[0],
    lambda node: ONES @ node,
    lambda node: node @ ONES.T,
    lambda node: np.equal(ONES, node),
    lambda node: np.dot(ONES, node),
    lambda node: np.stack([node, node]),
    np.asarray,
    np.sum,
    jnp.asarray,
    jnp.sum,
    lambda node: jnp.dot(X, node),
    lambda node: jnp.einsum("bi,io->bo", X, node),
    lambda node: jnp.where(True, node, node),
    lambda node: lax.convert_element_type(node, jnp.bfloat16),
    lambda node: X.at[0].set(node),
    jax.nn.relu,
    jax.jit(lambda node: X @ node),
]


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize("use", USES)
def test_node_in_the_place_of_an_array_is_refused(use, kind):
    node, hint = NODES[kind]
    with pytest.raises(TypeError, match=f"the {kind} is no array: .*{hint}"):
        use(node)


@pytest.mark.parametrize("kind", NODES)
def test_attribute_of_arrays_is_refused_and_no_other_is_explained(kind):
    node, hint = NODES[kind]
    for name in ("T", "astype", "reshape", "at", "sum"):
        with pytest.raises(AttributeError, match=f"{kind}.*no attribute '{name}'.*{hint}"):
            getattr(node, name)
    with pytest.raises(AttributeError, match=f"^'{kind}' object has no attribute 'rnak'$"):
        _ = node.rnak


@pytest.mark.parametrize("kind", NODES)
def test_nodes_are_copied_and_pickled(kind):
    node, _ = NODES[kind]
    for again in (copy.copy(node), copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert jax.tree.structure(again) == jax.tree.structure(node)
        jax.tree.map(np.testing.assert_array_equal, again, node)


def test_linen_without_lora_says_what_to_call():
    dense = nn.Dense(8)
    plain = dense.init(jax.random.key(0), X)
    params = jaxlora.init(
        jax.random.key(1), dense.apply, plain, X, config=jaxlora.LoRAConfig(rank=2)
    )
    with pytest.raises(TypeError, match=r"call the function as jaxlora.lora\(fn\)"):
        dense.apply(params, X)
