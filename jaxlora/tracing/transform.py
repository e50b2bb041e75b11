"""The transform: a function whose adapted weights run low-rank."""

import functools
import typing
from typing import TypeVar

import jax

from jaxlora.messages import checks
from jaxlora.tracing import boundary
from jaxlora.tracing import rules as rules  # which registers them
from jaxlora.tracing.evaluator import Evaluator
from jaxlora.tracing.options import Form, Options
from jaxlora.tracing.program import is_weight, trace, with_trained
from jaxlora.tracing.types import Value
from jaxlora.tracing.values import deferred
from jaxlora.tracing.values.lowrank import LowRank
from jaxlora.tracing.values.weight import Weight
from jaxlora.types import Function
from jaxlora.weights.adapters import merge_dtype

F = TypeVar("F", bound=Function)


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
            dropout, on a CPU or in products of precision HIGHEST. To train many adapters at once
            under `jax.vmap` force ``"factored"``: the base is then multiplied once for all.

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
        args, kwargs = with_trained((args, kwargs))
        if not any(map(is_weight, jax.tree.leaves((args, kwargs), is_leaf=is_weight))):
            return fn(*args, **kwargs)
        program = trace(fn, args, kwargs)
        outs = program.evaluated(evaluator, program.inputs)
        return program.rebuild([_left(evaluator, out) for out in outs])

    return fn_lora  # pyright: ignore[reportReturnType]


def _left(evaluator: Evaluator, out: Value) -> object:
    """Return an output as the caller gets it: an array, or the node of a weight passed through."""
    if not isinstance(out, Weight):
        return deferred.leave(out)
    if isinstance(out, LowRank) and out.is_reduced():
        return out.dense(merge_dtype(out.base.dtype))
    node = boundary.leave(out) if isinstance(out, LowRank) else None
    return evaluator.leave(out, "it leaves the function") if node is None else node
