"""`jax.export` of adapted functions: written, read again and called, against merged weights."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from mlp import X, close, gradients, mlp, trained

import jaxlora


@pytest.fixture
def params(key):
    return trained(key)


def test_exported_function_takes_adapted_weights_and_any_batch_and_has_gradients(params):
    (rows,) = export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 8), X.dtype)
    data = export.export(jax.jit(jaxlora.lora(mlp)))(params, x).serialize(vjp_order=1)
    again = export.deserialize(data)
    close(again.call(params, X[:2]), mlp(jaxlora.merge(params), X[:2]))
    got = jax.grad(lambda params: jnp.sum(jnp.sin(again.call(params, X))))(params)
    for path, wanted in gradients(mlp, params)[1].items():
        close((got[path].a, got[path].b), (wanted.a, wanted.b))


def test_exported_function_returns_adapters(params):
    _, adapters = jaxlora.split(params)
    data = export.export(jax.jit(lambda x: jax.tree.map(jnp.negative, x)))(adapters).serialize()
    got: Any = export.deserialize(data).call(adapters)
    assert jax.tree.structure(got) == jax.tree.structure(adapters)
    close(got, jax.tree.map(jnp.negative, adapters))


def test_exported_function_holds_adapted_weights(params):
    data = export.export(jax.jit(lambda x: jaxlora.lora(mlp)(params, x)))(X).serialize()
    close(export.deserialize(data).call(X), mlp(jaxlora.merge(params), X))


def test_exported_function_takes_quantized_weights(params):
    config = jaxlora.QuantizationConfig(block_size=4)
    params = jaxlora.quantize(mlp, params, X, config=config)
    data = export.export(jax.jit(jaxlora.lora(mlp)))(params, X).serialize()
    close(export.deserialize(data).call(params, X), mlp(jaxlora.merge(params), X))
