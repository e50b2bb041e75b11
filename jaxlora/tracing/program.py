"""A function of trees as a program of arrays, and back.

Only arrays are traced. Every other leaf of the arguments (flags, strings, Python numbers) is
handed to the function as it is, and so is every other leaf of what it returns.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxlora.tracing import boundary
from jaxlora.tracing.evaluator import Evaluator
from jaxlora.tracing.interpreter import evaluate
from jaxlora.tracing.types import Traced, Value
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import paths
from jaxlora.weights.nodes import LoRAWeight, TrainedLeaf
from jaxlora.weights.quantized import QuantizedWeight


def is_array(leaf: object) -> bool:
    """Tell whether a leaf is traced: an array or the shape and dtype of one."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind not in "OSU"
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function traced for some arguments.

    Attributes:
        jaxpr: the program, from the arrays among the arguments to those among the results.
        inputs: the arrays and the adapted weights among the arguments.
        paths: the path of each input.
        rebuild: makes the result of the function from the outputs of the program.
    """

    jaxpr: Traced
    inputs: list[Leaf]
    paths: list[str]
    rebuild: Callable[[Sequence[object]], PyTree]

    def evaluated(self, evaluator: Evaluator, inputs: Sequence[Leaf]) -> list[Value]:
        """Return the outputs for some inputs, in which adapted weights are low-rank."""
        pairs = zip(self.paths, inputs, strict=True)
        entered = [boundary.enter(evaluator, p, x) if is_weight(x) else x for p, x in pairs]
        return [*map(evaluator.leave, evaluate(evaluator, self.jaxpr, *entered))]


def trace(fn: Function, args: tuple, kwargs: dict[str, PyTree]) -> Program:
    """Trace a function once, with the base in the place of each adapted weight."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_weight)
    traced = [i for i, (_, leaf) in enumerate(leaves) if is_array(leaf) or is_weight(leaf)]
    inputs = [leaves[i][1] for i in traced]
    every = paths.names([keys for keys, _ in leaves], skip=2)  # args or kwargs, and which
    names = [every[i] for i in traced]
    result: dict[str, PyTree] = {}

    def flat(*arrays):
        values = [leaf for _, leaf in leaves]
        for position, array in zip(traced, arrays, strict=True):
            values[position] = array
        args, kwargs = jax.tree.unflatten(treedef, values)
        outs, result["treedef"] = jax.tree.flatten(fn(*args, **kwargs))
        result["outs"] = [None if is_array(out) else out for out in outs]
        return [out for out in outs if is_array(out)]

    arrays = [paths.abstract(paths.plain(leaf)) for leaf in inputs]
    jaxpr = jax.make_jaxpr(flat)(*arrays)

    def rebuild(outs):
        outs = iter(outs)
        filled = [next(outs) if out is None else out for out in result["outs"]]
        return jax.tree.unflatten(result["treedef"], filled)

    return Program(jaxpr, inputs, names, rebuild)


def with_trained(tree: PyTree) -> PyTree:
    """Return a tree with what each leaf that is trained whole or by rows is now in its place."""

    def is_whole(leaf):
        return isinstance(leaf, TrainedLeaf)

    if not any(map(is_whole, jax.tree.leaves(tree, is_leaf=is_whole))):
        return tree  # itself: what a function does to its arguments must be done to these
    return jax.tree.map(lambda x: x.now if is_whole(x) else x, tree, is_leaf=is_whole)


def is_weight(leaf: object) -> bool:
    """Tell whether a leaf stands for a weight that an evaluation takes as a value of its own."""
    return isinstance(leaf, LoRAWeight | QuantizedWeight)
