"""Models of the sizes of Llama 3, placed on slices of TPUs that are not there.

Weights are split over a mesh of ``fsdp x tensor`` devices, rows of the batch over ``fsdp``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import llama
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

    layers: int
    width: int
    hidden: int
    heads: int
    groups: int = 8
    vocabulary: int = 128256


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
        sizes: of the model.
        topology: chip and shape of the slice.
        fsdp: devices that each have other rows.
        tensor: devices with the same rows.
        batch: rows of all devices.
        tokens: tokens of a row.
        gathers: whether the program says that a layer gathers its weights over ``fsdp``.
    """

    sizes: Sizes
    topology: str
    fsdp: int
    tensor: int
    batch: int
    tokens: int = 2048
    gathers: bool = False

    @property
    def chip(self) -> str:
        """The generation of the chips."""
        return self.topology.partition(":")[0]


SMALL = Sizes(layers=32, width=4096, hidden=14336, heads=32)
LARGE = Sizes(layers=80, width=8192, hidden=28672, heads=64)
CASES = {
    "8B on v5e-16": Case(SMALL, "v5e:4x4", fsdp=4, tensor=4, batch=16),
    "70B on v5p-128": Case(LARGE, "v5p:4x4x4", fsdp=16, tensor=4, batch=32),
    "70B on v5e-256": Case(LARGE, "v5e:16x16", fsdp=32, tensor=8, batch=64),
}
CASES |= {f"{name}, gathered": dataclasses.replace(CASES[name], gathers=True) for name in CASES}
COLUMNS, ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")  # what the tensor axis splits


def shapes(case: Case, mesh: Mesh, layers: int) -> Any:
    """Return the shapes of the parameters, each on its place in the mesh."""
    sizes = case.sizes
    d, f, v = sizes.width, sizes.hidden, sizes.vocabulary
    kv = d // sizes.heads * sizes.groups
    columns = dict(zip(COLUMNS, ((d, d), (d, kv), (d, kv), (d, f), (d, f)), strict=True))
    rows = dict(zip(ROWS, ((d, d), (f, d)), strict=True))

    def shape(sizes, *spec):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    stack: dict[str, Any] = {
        name: shape((layers, *size), None, "fsdp", "tensor") for name, size in columns.items()
    }
    stack |= {name: shape((layers, *size), None, "tensor", "fsdp") for name, size in rows.items()}
    stack |= {name: shape((layers, d)) for name in ("attention_norm", "norm")}
    return {
        "embed": shape((v, d), "tensor", "fsdp"),
        "layers": stack,
        "norm": shape((d,)),
        "head": shape((d, v), "fsdp", "tensor"),
    }


def layer(case: Case, place: Callable[..., jax.Array], x: jax.Array, w: Any) -> jax.Array:
    """Return the output of one layer, ``(batch, time, width)`` as x."""
    per_head = case.sizes.width // case.sizes.heads

    def heads(y):
        return y.reshape(*y.shape[:2], -1, per_head)

    h = llama.normed(x, w["attention_norm"])
    q, k, v = (heads(h @ w[name]) for name in "qkv")
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = place(x + h @ w["o"])
    h = llama.normed(x, w["norm"])
    h = place(jax.nn.silu(h @ w["gate"]) * (h @ w["up"]), "tensor")
    return place(x + h @ w["down"])


def forward(case: Case, mesh: Mesh, params: Any, tokens: jax.Array, vector: Any = 0) -> jax.Array:
    """Return logits ``(batch, time, vocabulary)`` for ids ``(batch, time)``."""

    def place(x, last=None):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp", None, last)))

    def gathered(w):
        """Return the weights of a layer, those of products on the devices of one fsdp index."""
        spec = dict.fromkeys(COLUMNS, P(None, "tensor")) | dict.fromkeys(ROWS, P("tensor", None))
        placed = {
            name: jax.lax.with_sharding_constraint(w[name], NamedSharding(mesh, spec[name]))
            for name in spec
        }
        return w | placed

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(x, w):
        return layer(case, place, x, gathered(w) if case.gathers else w), None

    x = place(params["embed"][tokens] + vector)
    x, _ = jax.lax.scan(body, x, params["layers"])
    return place(llama.normed(x, params["norm"]) @ params["head"], "tensor")


def mesh_of(case: Case) -> Mesh:
    """Return the devices of the slice, which is not there."""
    topology = topologies.get_topology_desc(case.topology, "tpu")
    devices = np.array(topology.devices).reshape(case.fsdp, case.tensor)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
