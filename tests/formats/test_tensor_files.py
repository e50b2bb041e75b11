"""Tensors are views of their file while it is read, and what is made of them is not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import CONFIG, PREFIX, TENSORS
from numpy.testing import assert_array_equal

import jaxlora
from jaxlora.formats import Names, peft, safetensors

SIZE = 16  # of which a vector in float32 fills a line of the cache
NAMES = Names(("w", "w"), ("head", "head"), ("head.bias", "bias"), ("norm", "norm", "tensor"))


def program(params, x):
    x = x @ params["w"] * params["norm"][None]
    return x @ params["head"] + params["bias"][None]


def params():
    square = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    vector = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
    return {"w": square, "head": square, "bias": vector, "norm": vector}


def sites():
    return jaxlora.find_sites(program, params(), jax.ShapeDtypeStruct((2, SIZE), jnp.float32))


def written(path, tensors, multiple):
    """Write tensors behind a header whose length is a multiple of some bytes, with its own."""
    header, start = {}, 0
    for name, tensor in tensors.items():
        offsets = [start, start + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": offsets}
        start += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % multiple)
    if multiple == 1 and len(text) % 2 == 0:
        text += b" "  # so that no tensor begins at a multiple of its width
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return 8 + len(text)


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def of_peft(folder, multiple):
    """Write a folder of factors of rank 1, whose transposes lie as they do, and of values."""
    own = {
        "w.lora_A.weight": drawn(1, SIZE),
        "w.lora_B.weight": drawn(SIZE, 1),
        "w.lora_magnitude_vector": drawn(SIZE),
        "head.weight": drawn(SIZE, SIZE),
        "head.bias": drawn(SIZE),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w"]}
    config |= {"use_dora": True, "modules_to_save": ["head"]}
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {PREFIX + name: x for name, x in own.items()}
    start = written(folder / TENSORS, tensors, multiple)
    made = peft.load(folder, sites=sites(), names=NAMES)
    wanted = [own["w.lora_A.weight"].T, own["w.lora_B.weight"].T, own["w.lora_magnitude_vector"]]
    wanted += [own["head.weight"].T, own["head.bias"]]
    got = [made["w"].a, made["w"].b, made["w"].magnitude, made["head"].value, made["bias"].value]
    return folder / TENSORS, start, got, wanted


def of_checkpoint(folder, multiple):
    own = {"w.weight": drawn(SIZE, SIZE), "head.weight": drawn(SIZE, SIZE)}
    own |= {"head.bias": drawn(SIZE), "norm": drawn(SIZE)}
    path = folder / "model.safetensors"
    start = written(path, own, multiple)
    made = safetensors.load(path, NAMES, params(), sites=sites())
    wanted = [own["w.weight"].T, own["head.weight"].T, own["head.bias"], own["norm"]]
    return path, start, [made[name] for name in ("w", "head", "bias", "norm")], wanted


@pytest.mark.parametrize("multiple", [64, 1])
@pytest.mark.parametrize("load", [of_peft, of_checkpoint])
def test_what_was_read_stays_when_the_file_is_written_over(load, multiple, tmp_path):
    path, start, got, wanted = load(tmp_path, multiple)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * (path.stat().st_size - start))
    for one, other in zip(got, wanted, strict=True):
        assert_array_equal(one, other)
