"""From a function of trees to a program of arrays, and back.

Only arrays are traced. Every other leaf of the arguments (flags, strings, Python numbers) is
handed to the function as it is, and so is every other leaf of what it returns.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxlora.messages import checks
from jaxlora.tracing import boundary, deferred
from jaxlora.tracing.interpreter import Evaluator, Form, Options
from jaxlora.tracing.lowrank import LowRank
from jaxlora.weights import paths
from jaxlora.weights.nodes import LoRAWeight, TrainedLeaf
from jaxlora.weights.quantized import QuantizedWeight

F = TypeVar("F", bound=Callable[..., Any])


def is_array(leaf: Any) -> bool:
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

    jaxpr: Any
    inputs: list[Any]
    paths: list[str]
    rebuild: Callable[[list[Any]], Any]

    def evaluated(self, evaluator: Evaluator, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs for some inputs, in which adapted weights are low-rank."""
        pairs = zip(self.paths, inputs, strict=True)
        entered = [boundary.enter(evaluator, p, x) if _is_weight(x) else x for p, x in pairs]
        return [*map(evaluator.left, evaluator.run(self.jaxpr, *entered))]


def trace(fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Program:
    """Trace a function once, with the base in the place of each adapted weight."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_weight)
    traced = [i for i, (_, leaf) in enumerate(leaves) if is_array(leaf) or _is_weight(leaf)]
    inputs = [leaves[i][1] for i in traced]
    every = paths.names([keys for keys, _ in leaves], skip=2)  # args or kwargs, and which
    names = [every[i] for i in traced]
    result: dict[str, Any] = {}

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


def values(tree: Any) -> Any:
    """Return a tree with what each leaf that is trained whole or by rows is now in its place."""

    def is_whole(leaf):
        return isinstance(leaf, TrainedLeaf)

    if not any(map(is_whole, jax.tree.leaves(tree, is_leaf=is_whole))):
        return tree  # itself: what a function does to its arguments must be done to these
    return jax.tree.map(lambda x: x.now if is_whole(x) else x, tree, is_leaf=is_whole)


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, LoRAWeight | QuantizedWeight)


def lora(fn: F, *, strict: bool = False, form: Form = "auto") -> F:
    """Make a function accept adapted weights wherever it takes arrays.

    Where the function consumes a weight ``W``, the result computes ``x W + scaling * (x a) b``
    without forming the sum, on the same axes and in the same dtype. Bases get no gradient. The
    function is traced on every call, so call it under `jax.jit`. ``jit``, ``grad``, ``vmap``,
    ``jvp`` and ``remat`` compose inside and outside.

    Args:
        fn: any function of pytrees, as ``model.apply`` or a loss.
        strict: raise where a weight would have to be made dense.
        form: how a differentiated product is computed: ``"factored"``, never a weight-sized
            array; ``"weight-side"``, the weight in effect made for it in each pass, which is
            cheaper for many tokens; or ``"auto"``, the cheaper one by its shapes, the second only
            on one device and where no bits are lost: for weights of float32 and wider, without
            dropout. To train many adapters at once under `jax.vmap` force ``"factored"``: the
            base is then multiplied once for all.

    Returns:
        A function of the same signature. Without a `LoRAWeight`, a `TrainedLeaf` or a
        `QuantizedWeight` among its arguments it is fn.

    Raises:
        ValueError: there is no such form; with strict, at a call in which a weight reaches an
            operation without a low-rank rule. Without strict this is a `MaterializationWarning`.
        TypeError: fn is no function, or strict no bool.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["w"])
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=2)
    >>> adapted = jaxlora.init(jax.random.key(0), model, params, x, config=config)
    >>> bool((jaxlora.lora(model)(adapted, x) == model(params, x)).all())
    True
    """
    checks.check_function(fn, "lora(fn)(params, *args)")
    checks.check_flag(strict, "strict")
    checks.check_choice(form, "form", typing.get_args(Form))
    return _low_rank(fn, Options(strict=strict, form=form))


def observe(fn: F) -> F:
    """Make a function of adapted weights whose gradients tell of the inputs of its products.

    Its results are those of the bases. The gradient of a factor ``a`` of any function of them is
    ``(x^T x) a``, with x all that the weight was multiplied with.
    """
    return _low_rank(fn, Options(observes=True))


def _low_rank(fn: F, options: Options) -> F:
    """Return a function that is evaluated by some options."""
    evaluator = Evaluator(options)

    @functools.wraps(fn)
    def fn_lora(*args, **kwargs):
        args, kwargs = values((args, kwargs))
        if not any(map(_is_weight, jax.tree.leaves((args, kwargs), is_leaf=_is_weight))):
            return fn(*args, **kwargs)
        program = trace(fn, args, kwargs)
        outs = program.evaluated(evaluator, program.inputs)
        return program.rebuild([_left(evaluator, out) for out in outs])

    return fn_lora  # pyright: ignore[reportReturnType]


def _left(evaluator: Evaluator, out: Any) -> Any:
    """Return an output as the caller gets it: an array, or the node of a weight passed through."""
    if not isinstance(out, LowRank):
        return deferred.left(out)
    node = boundary.leave(out)
    return evaluator.left(out, "it leaves the function") if node is None else node
