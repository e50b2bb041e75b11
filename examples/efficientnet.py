"""EfficientNet-Lite0 in Flax Linen, and how to fill it with weights that PyTorch has pickled.

Tan and Le 2019, arXiv:1905.11946; the Lite models leave squeeze-and-excitation out. No module here
knows of adapters.
"""

import collections
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import as_strided


class Stage(NamedTuple):
    """Blocks of one kind: the first has the stride, the others a stride of 1."""

    blocks: int
    features: int
    kernel: int
    stride: int


STAGES = (
    Stage(1, 16, 3, 1),
    Stage(2, 24, 3, 2),
    Stage(2, 40, 5, 2),
    Stage(3, 80, 3, 2),
    Stage(3, 112, 5, 1),
    Stage(4, 192, 5, 2),
    Stage(1, 320, 3, 1),
)


class Norm(nn.Module):
    """Batch normalization with statistics that stay what they are, ``mean`` and ``var``."""

    @nn.compact
    def __call__(self, x):
        """Return ``(batch, height, width, features)`` for the same."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        shape = x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        scale = scale * jax.lax.rsqrt(var + 1e-3)
        shift = bias - mean * scale
        return x * scale[None, None, None] + shift[None, None, None]


class Depthwise(nn.Module):
    """A convolution of each feature by itself, as a sum of shifted products.

    On a CPU the compiler's own is several times slower.

    Attributes:
        size: of the kernel, in both directions.
        stride: in both directions.
    """

    size: int
    stride: int

    @nn.compact
    def __call__(self, x):
        """Return ``(batch, height / stride, width / stride, features)``."""
        shape = (self.size, self.size, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        sizes, step = x.shape[1:3], self.stride
        window = (self.size, self.size)
        pads = jax.lax.padtype_to_pads(sizes, window, (step, step), "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        high, wide = ((size - 1) // step * step + 1 for size in sizes)
        return sum(
            x[:, i : i + high : step, j : j + wide : step] * kernel[i, j][None, None, None]
            for i in range(self.size)
            for j in range(self.size)
        )


class Block(nn.Module):
    """An inverted bottleneck: to more features, a depthwise convolution, to few again.

    Attributes:
        features: that come out.
        kernel: size of the depthwise convolution.
        stride: of the depthwise convolution.
        expansion: how many times the features of the input are inside.
    """

    features: int
    kernel: int
    stride: int
    expansion: int = 6

    @nn.compact
    def __call__(self, x):
        """Return ``(batch, height / stride, width / stride, features)``."""
        h = x
        if self.expansion > 1:
            h = nn.Conv(x.shape[-1] * self.expansion, (1, 1), use_bias=False, name="expand")(h)
            h = nn.relu6(Norm(name="expand_norm")(h))
        h = Depthwise(self.kernel, self.stride, name="depthwise")(h)
        h = nn.relu6(Norm(name="depthwise_norm")(h))
        h = nn.Conv(self.features, (1, 1), use_bias=False, name="project")(h)
        h = Norm(name="project_norm")(h)
        return x + h if x.shape == h.shape else h


class EfficientNet(nn.Module):
    """EfficientNet-Lite0.

    Attributes:
        stages: of blocks.
    """

    stages: tuple[Stage, ...] = STAGES

    @nn.compact
    def __call__(self, images):
        """Return vectors ``(batch, 1280)`` for images ``(batch, height, width, 3)``, 0 to 255."""
        x = (jnp.asarray(images, jnp.float32) - 127) / 128
        x = nn.Conv(32, (3, 3), 2, use_bias=False, name="stem")(x)
        x = nn.relu6(Norm(name="stem_norm")(x))
        blocks = [
            (stage, stage.stride if first == 0 else 1)
            for stage in self.stages
            for first in range(stage.blocks)
        ]
        for i, (stage, stride) in enumerate(blocks):
            expansion = 1 if i == 0 else 6
            block = Block(stage.features, stage.kernel, stride, expansion, name=f"block_{i}")
            x = block(x)
        x = nn.relu6(Norm(name="top_norm")(nn.Conv(1280, (1, 1), use_bias=False, name="top")(x)))
        return x.mean((1, 2))


_MODULES = {
    "_conv_stem": "stem",
    "_bn0": "stem_norm",
    "_conv_head": "top",
    "_bn1": "top_norm",
    "_fc": "head",
}
_OF_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "expand_norm",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm",
    "_project_conv": "project",
    "_bn2": "project_norm",
}
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def load(path: Path) -> tuple[Any, dict[str, jax.Array]]:
    """Return the parameters of an `EfficientNet`, and of the head for ImageNet's 1,000 classes."""
    params: dict[str, Any] = {}
    for name, tensor in read_pickle(path).items():
        if name.endswith("num_batches_tracked"):
            continue
        *modules, leaf = name.split(".")
        place = params
        if modules[0] == "_blocks":
            place = params.setdefault(f"block_{modules[1]}", {})
        module = (_OF_BLOCK if len(modules) > 1 else _MODULES)[modules[-1]]
        leaf = _NORM[leaf] if "norm" in module else {"weight": "kernel"}.get(leaf, leaf)
        place.setdefault(module, {})[leaf] = jnp.asarray(_laid_out(module, tensor))
    head = params.pop("head")
    return {"params": params}, head


def _laid_out(module: str, tensor: np.ndarray) -> np.ndarray:
    """Return a tensor with its axes as Flax has them: ``(..., in, out)``."""
    if module == "depthwise":
        return tensor[:, 0].transpose(1, 2, 0)
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file of ``torch.save``, in the format that it had until 2020.

    Raises:
        pickle.UnpicklingError: the file holds something else than tensors by name.
    """
    with path.open("rb") as file:
        for _ in range(3):  # a number, the version of the format, what machine wrote it
            _Unpickler(file).load()
        unpickler = _Unpickler(file)
        views = unpickler.load()
        for key in _Unpickler(file).load():  # the storages, in this order
            storage = unpickler.storages[key]
            if (count := int.from_bytes(file.read(8), "little")) != storage.size:
                raise pickle.UnpicklingError(f"{path}: {storage.size} values said, got {count}")
            storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return {name: view.copy() for name, view in views.items()}


class _Unpickler(pickle.Unpickler):
    """Reads what the files have, and nothing that could run code."""

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"no tensor: {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid):
        _, dtype, key, _, count, _ = pid
        return self.storages.setdefault(key, np.empty(count, dtype))


def _view(storage, offset, shape, strides, *_):
    strides = [stride * storage.itemsize for stride in strides]
    return as_strided(storage[offset:], shape, strides)


_ALLOWED: Any = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch", "FloatStorage"): np.float32,
    ("torch", "LongStorage"): np.int64,
}
