"""EfficientNet, a convolutional network, learns classes of pictures."""

from typing import Any

import efficientnet
import fetch
import jax
import numpy as np
from fashion import Images, read_images, training_batches
from sklearn.datasets import load_digits

import jaxlora

from .tasks import Task, cross_entropy, head, logits, probe

_WEIGHTS = ("expand", "project", "top")


def fashion(quick: bool = False) -> Task:
    """EfficientNet-Lite0 (3.4 M parameters without its head) learns ten kinds of clothes."""
    data = read_images(0, 60, 20, enlarged=1) if quick else read_images(0)
    held_back = 20 if quick else 400
    network = efficientnet.EfficientNet(efficientnet.STAGES[: 2 if quick else None])
    if quick:  # there are no pretrained weights of so few blocks
        params = network.init(jax.random.key(0), data[0].images[:1])
    else:
        params, _ = efficientnet.load(fetch.efficientnet())
    params = {"network": params["params"], "head": head(1280, 10)}
    parts = {"validation": data[0].take(slice(held_back)), "held out": data[1].take(slice(1200))}
    train, other = data[0].take(slice(held_back, None)), _digits(quick)

    def encode(params, images):
        return network.apply({"params": params["network"]}, images)

    def fn(params, images):
        return logits(params["head"], encode(params, images))

    vectors = jax.jit(jaxlora.lora(encode, strict=True))

    def score(predict, params, part):
        found = _in_batches(predict, params, parts[part].images)
        return float((found.argmax(-1) == parts[part].labels).mean())

    def probed(params, train, held_out):
        return probe(lambda data: _in_batches(vectors, params, data.images), train, held_out)

    return Task(
        name="fashion",
        fn=fn,
        params=params,
        example=(train.images[:1],),
        inputs=lambda batch: (batch.images,),
        loss=lambda out, batch: cross_entropy(out, batch.labels),
        batches=lambda seed: training_batches(train, 8 if quick else 32, seed),
        score=score,
        general=lambda params: probed(params, *other),
        probe=lambda: probed(params, train, parts["held out"]),
        weights={"all": _WEIGHTS},
        leaves={
            "new": "head/.*",
            "head": "head/.*",
            "biases": ".*/bias",  # of normalizations: there are no others
            "all": "(?!.*/(mean|var)$).*",
        },
        higher_is_better=True,
        steps=3 if quick else 80,
    )


def _digits(quick: bool) -> tuple[Images, Images]:
    """Return written digits, 8 x 8 pixels in the file, to see what the network still tells."""
    found, labels = load_digits(return_X_y=True)
    size = 2 if quick else 7
    images = (found * 15.9).astype(np.uint8).reshape(-1, 8, 8).repeat(size, 1).repeat(size, 2)
    data = Images(np.repeat(images[..., None], 3, axis=-1), labels.astype(np.int32))
    train, held_out = (60, 20) if quick else (600, 400)
    return data.take(slice(train)), data.take(slice(train, train + held_out))


def _in_batches(fn: Any, params: Any, images: np.ndarray) -> np.ndarray:
    """Return ``fn(params, images)``, computed 20 images at a time."""
    return np.concatenate(
        [fn(params, images[start : start + 20]) for start in range(0, len(images), 20)]
    )
