"""A mesh of devices: weights split over all of it, the rows of a batch over its first axis.

``fsdp x tensor``: along "fsdp" each device holds a part of every weight and has rows of its own;
along "tensor" devices have the same rows and parts of the heads and hidden units. None is one
device.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Mesh = jax.sharding.Mesh | None

_SECOND = ("attention_out", "down")  # kernels whose input is what "tensor" splits


def made(text: str | None) -> Mesh:
    """Return the mesh that a text as ``4x2`` names, over all devices of all processes."""
    if text is None:
        return None
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise SystemExit(f"--mesh must be two numbers, as 4x2: got {text!r}")
    fsdp, tensor = map(int, sizes)
    if fsdp * tensor != (count := jax.device_count()):
        raise SystemExit(f"--mesh {text} needs {fsdp * tensor} devices: got {count}")
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def placed(params: Any, mesh: Mesh) -> Any:
    """Return the parameters of a `smollm.LanguageModel`, each weight split over the mesh."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        spec: tuple[Any, ...] = ()
        if "kernel" in name:
            spec = (
                ("tensor", "fsdp") if any(part in name for part in _SECOND) else ("fsdp", "tensor")
            )
        elif "embedding" in name:
            spec = ("tensor", "fsdp")
        return _put(leaf, mesh, P(*[None] * (leaf.ndim - len(spec)), *spec))

    return jax.tree.map_with_path(place, params)


def committed(tree: Any, mesh: Mesh) -> Any:
    """Return arrays that are bound to where they are, as restored ones are: no second program.

    What is on one device is copied to all of the mesh.
    """

    def commit(leaf):
        on_mesh = mesh is not None and getattr(leaf.sharding, "mesh", None) == mesh
        return leaf if on_mesh else _put(leaf, mesh, P())

    return jax.tree.map(commit, tree)


def spread(batch: Any, mesh: Mesh) -> Any:
    """Return a batch, which every process has as a whole, with its rows spread over "fsdp"."""
    return jax.tree.map(lambda leaf: _put(leaf, mesh, P("fsdp")), batch)


def _put(leaf: Any, mesh: Mesh, spec: P) -> jax.Array:
    if mesh is None:
        return jax.device_put(leaf, jax.local_devices()[0])
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
