"""Which tensor of a checkpoint a leaf is, where no module tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import equal
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

import jaxlora
from jaxlora.formats import Names, safetensors

FILE = "model.safetensors"
ONE = np.ones(3, np.float32)


def test_a_tensor_has_one_place(tmp_path):
    params = {"a": ONE, "b": ONE}
    sites = jaxlora.find_sites(lambda params, x: x * params["a"] + params["b"], params, ONE)
    with pytest.raises(ValueError, match=r"two places have the tensor 'm.weight': a, b"):
        safetensors.save(tmp_path / "it", params, Names(("m", "a"), ("m.weight", "b")), sites=sites)


def test_a_matrix_that_no_product_tells_of_is_not_guessed(tmp_path):
    params = {"w": jnp.ones((4, 4))}
    sites = jaxlora.find_sites(lambda params, x: x + params["w"], params, jnp.ones((4, 4)))
    with pytest.raises(
        ValueError, match=r"does not tell how the leaf 'w' lies: reaches add; if it"
    ):
        safetensors.save(tmp_path / "it", params, Names(("w", "w")), sites=sites)
    names = Names(("w", "w", "embedding"))
    safetensors.save(tmp_path / "it", params, names, sites=sites)
    equal(safetensors.load(tmp_path / "it", names, params, sites=sites), params)


def test_tensors_of_no_module_keep_their_names(tmp_path):
    params = {"cls": ONE, "mean": jnp.ones(3), "experts": jnp.arange(24.0).reshape(2, 4, 3)}
    sites = jaxlora.find_sites(
        lambda params, x: jnp.einsum("ti,eio->to", x, params["experts"]) + params["mean"][None],
        params,
        jnp.ones((2, 4)),
    )
    names = Names(
        ("cls_token", "cls", "tensor"),
        ("norm.running_mean", "mean", "tensor"),
        ("mlp.experts.up", "experts", "tensor"),
    )
    safetensors.save(tmp_path / "it", params, names, sites=sites)
    found = load_file(tmp_path / "it" / FILE)
    assert found.keys() == {"cls_token", "norm.running_mean", "mlp.experts.up"}
    assert_array_equal(found["mlp.experts.up"], params["experts"])
    equal(safetensors.load(tmp_path / "it", names, params, sites=sites), params)


def test_a_transposed_convolution_is_not_taken_for_one(tmp_path):
    params = {"k": jnp.ones((3, 3, 4, 4))}
    sites = jaxlora.find_sites(
        lambda params, x: jax.lax.conv_transpose(x, params["k"], (2, 2), "SAME"),
        params,
        jnp.ones((1, 6, 6, 4)),
    )
    with pytest.raises(ValueError, match="no convolution in the program tells which"):
        safetensors.save(tmp_path / "it", params, Names(("up", "k", "conv")), sites=sites)
