"""One function for each primitive that takes low-rank weights; importing this registers them."""

from jaxlora.tracing.rules import (
    arithmetic,
    contraction,
    control,
    convolution,
    indexing,
    loops,
    meshes,
    structural,
)

__all__ = [
    "arithmetic",
    "contraction",
    "control",
    "convolution",
    "indexing",
    "loops",
    "meshes",
    "structural",
]
