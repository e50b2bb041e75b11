"""The convolutional network and the pictures of the examples."""

import pickle
from typing import Any

import efficientnet
import fashion
import fetch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

import jaxlora

pytestmark = pytest.mark.once

needs_weights = pytest.mark.skipif(
    not fetch.has(fetch.EFFICIENTNET_PTH),
    reason="the weights are not in the cache: run examples/reproduce.py fine_tuning once",
)
needs_pictures = pytest.mark.skipif(
    not fetch.has(*fetch.FASHION_IDX),
    reason="the pictures are not in the cache: run examples/reproduce.py fine_tuning once",
)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(7, 7), (8, 5), (2, 1)])
def test_depthwise_convolution_is_the_compilers(size, stride, shape):
    x = jax.random.normal(jax.random.key(0), (2, *shape, 6))
    model = efficientnet.Depthwise(size, stride)
    params: Any = model.init(jax.random.key(1), x)
    want = jax.lax.conv_general_dilated(
        x,
        params["params"]["kernel"][:, :, None],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    got: Any = model.apply(params, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


@needs_weights
def test_network_knows_the_palace():
    params, head = efficientnet.load(fetch.efficientnet())
    picture = load_sample_image("china.jpg")
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    picture = jnp.float32(picture[top : top + side, left : left + side])
    vector: Any = efficientnet.EfficientNet().apply(
        params, jax.image.resize(picture, (224, 224, 3), "bilinear")[None]
    )
    assert (vector @ head["kernel"])[0].argmax() == 698  # palace


@needs_weights
def test_all_weights_have_their_place_and_the_convolutions_are_adapted():
    params, head = efficientnet.load(fetch.efficientnet())
    network, images = efficientnet.EfficientNet(), jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert head["kernel"].shape == (1280, 1000)
    config = jaxlora.LoRAConfig(rank=2, targets=("expand", "project", "top"))
    adapted = jaxlora.init(jax.random.key(0), network.apply, params, images, config=config)
    assert len(jaxlora.split(adapted)[1]) == 15 + 16 + 1
    jax.eval_shape(jaxlora.lora(network.apply, strict=True), adapted, images)


@pytest.mark.parametrize("text", [b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR."])
def test_pickles_that_run_code_are_refused(text, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"".join(pickle.dumps(x) for x in (1, 2, {})) + text)
    with pytest.raises(pickle.UnpicklingError, match=r"no tensor: (os|builtins)\."):
        efficientnet.read_pickle(path)


@needs_pictures
def test_pictures_are_those_of_the_official_sets():
    train, held_out = fashion.read_images(0, 1000, 500)
    assert train.images.shape == (1000, 56, 56, 3)
    assert held_out.images.dtype == np.uint8
    assert (np.bincount(train.labels, minlength=10) > 60).all()
    np.testing.assert_array_equal(train.images[:, ::2, ::2, 0], train.images[:, 1::2, 1::2, 2])
    again, _ = fashion.read_images(0, 1000, 500)
    np.testing.assert_array_equal(again.images, train.images)
    everything, _ = fashion.read_images(0, 60_000, 10, enlarged=1)
    assert (np.bincount(everything.labels) == 6000).all()


def test_batches_have_every_picture_once_before_one_comes_again():
    data = fashion.Images(np.zeros((10, 1, 1, 3), np.uint8), np.arange(10))
    batches = fashion.training_batches(data, 5, seed=0)
    seen = [next(batches).labels for _ in range(4)]
    for first in (0, 2):
        assert sorted(np.concatenate(seen[first : first + 2])) == list(range(10))
    with pytest.raises(ValueError, match="too few images for a batch: 11 needed, got 10"):
        next(fashion.training_batches(data, 11, seed=0))
