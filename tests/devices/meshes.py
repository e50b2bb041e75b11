"""Meshes of eight devices, ways to lay a model out on them, and what a compiled program sends."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.sharding import AxisType, NamedSharding

KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
LAYOUTS = {
    "fsdp": {"data": 8},
    "tp": {"model": 8},
    "both": {"data": 4, "model": 2},
    "turned": {"data": 2, "model": 4},
}


def make(kind, layout="both"):
    """Return a mesh of all devices."""
    axes = LAYOUTS[layout]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (KINDS[kind],) * len(axes))


def place(tree, specs, mesh):
    """Put arrays on a mesh; axes that it does not have are left out of their specs."""

    def put(array, spec):
        kept = P(*(name if name in mesh.axis_names else None for name in spec))
        return jax.device_put(array, NamedSharding(mesh, kept))

    return jax.tree.map(put, tree, specs)


def is_placed(array, *spec):
    """Tell whether an array has this spec on the mesh that it is on."""
    wanted = NamedSharding(array.sharding.mesh, P(*spec))
    return array.sharding.is_equivalent_to(wanted, array.ndim)


_COLLECTIVE = re.compile(
    r"= (?P<shapes>\S.*?) "
    r"(?P<name>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")


def collectives(fn, *args):
    """Return name and shape of the result of each collective that a function compiles to."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    found = []
    for match in _COLLECTIVE.finditer(text or ""):
        for shape in _SHAPE.findall(match["shapes"]):
            found.append((match["name"], tuple(int(n) for n in shape.split(",") if n)))
    return sorted(found)


def size(collective):
    """Return the number of elements of the result of a collective."""
    return math.prod(collective[1])


def random(shapes):
    """Return a dict of arrays of these shapes, each of unit gain along its first axis."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[0]), jnp.float32)
        for name, shape in shapes.items()
    }
