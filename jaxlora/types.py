"""Names for what has no narrower type: trees, and what may stand in them.

A tree of parameters is whatever its model makes it, so these are all `typing.Any` to a type
checker. The names say what is meant.
"""

from collections.abc import Callable
from typing import Any

PyTree = Any  # a tree of arrays, as the functions of JAX take and return
Leaf = Any  # what stands at a path: an array, the shape of one, a quantized weight or a node
Leaves = dict[str, Leaf]  # by path
Function = Callable[..., Any]  # of any arguments
Json = dict[str, Any]  # an object of JSON
