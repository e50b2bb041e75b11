"""The module that holds a module and its adapters."""

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlora.messages import checks
from jaxlora.nnx import call
from jaxlora.nnx.frozen import freeze, restore
from jaxlora.targets.config import LoRAConfig
from jaxlora.trees import adapting, binding, merging
from jaxlora.trees.dropout import dropout
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights.adapters import Adapter, Adapters, Replacement
from jaxlora.weights.fingerprints import Fingerprint

M = TypeVar("M", bound=nnx.Module)


class Factor(nnx.LoRAParam[jax.Array]):
    """A factor of an adapted weight: what filters for `flax.nnx.LoRAParam` and Param select."""


class _Factors(nnx.Pytree):
    """What is trained of one leaf, a `Factor` each, and what is static of its adapter."""

    def __init__(self, adapter: Adapter | Replacement):
        self.a: Leaf = nnx.data(None)
        self.b: Leaf = nnx.data(None)
        self.magnitude: Leaf = nnx.data(None)
        self.value: Leaf = nnx.data(None)
        trained = adapter.trained()
        for name, array in trained.items():
            setattr(self, name, nnx.data(Factor(array)))
        empty: Leaves = dict.fromkeys(trained)
        # of an unknown base: the module holds its own, and may be cast or trained itself
        about = dataclasses.replace(adapter, fingerprint=Fingerprint(), **empty)
        self.about = nnx.static(about)

    def adapter(self) -> Adapter | Replacement:
        """Return the adapter of the leaf."""
        found = {name: getattr(self, name) for name in self.about.fields}
        arrays = {name: x.get_value() for name, x in found.items() if x is not None}
        return dataclasses.replace(self.about, **arrays)


class Adapted(nnx.Module, Generic[M]):
    """A module with adapters: a copy of the module that shares its arrays, and the factors.

    Call it as the module: every adapted weight ``W`` acts as ``W + scaling * a b``, and the sum
    is not formed. The module is traced on every call, so call it under `flax.nnx.jit`. It may
    take the place of the module inside a larger one.

    The factors are its only variables of type `flax.nnx.Param`, so that they alone are trained by
    ``nnx.Optimizer(adapted, tx, wrt=nnx.Param)`` with ``nnx.grad(loss)(adapted)``, and likewise
    with the filters `flax.nnx.LoRAParam` and `Factor`. Every parameter of the module, biases and
    norms too, is held as a `Frozen` variable; during a call it has its own type again.

    What the module changes of itself in a call, such as statistics, counts of streams and caches,
    is written to ``model``. Writes to a parameter, as of spectral normalization, hold for that
    call alone.

    The module given is not altered. Variables are not shared with it, so that a weight or random
    stream that it shares with other modules of a larger one is no longer shared with them.
    Arrays are shared: donating those of one, as with ``nnx.jit(donate_argnums=0)``, deletes
    those of the other.

    Attributes:
        model: the copy of the module, whose parameters are `Frozen`.
        factors: for each path what is trained of it, each a `Factor`: ``a`` of shape
            ``(*stack, *in, rank)``, ``b`` of ``(*stack, rank, *out)``, a magnitude if it has one;
            or the value of a leaf that is trained whole.
        deterministic: no dropout; `flax.nnx.Module.eval` sets it, ``train`` clears it.

    Args:
        model: the module.
        adapters: factors by path in ``flax.nnx.state(model)``, as from `jaxlora.load_adapters`.
        dropout_rate: share dropped of the low-rank path's input, in [0, 1); see `jaxlora.dropout`.
        rngs: random streams for dropout, of which ``dropout`` is drawn from.
        check_base: False puts adapters on any weights of their shape, see `jaxlora.bind`.

    Raises:
        TypeError: model is no module, a value of adapters no adapter, dropout_rate no number, or
            rngs no `flax.nnx.Rngs`.
        ValueError: adapters is empty, one does not fit the module or was made for other weights,
            the module is adapted already, dropout_rate is not in [0, 1), or dropout has no rngs.

    >>> import jax.numpy as jnp, jaxlora.nnx, optax
    >>> from flax import nnx
    >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1, alpha=1)
    >>> adapted = jaxlora.nnx.adapt(nnx.Rngs(1), model, x, config=config)
    >>> optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(adapted, optimizer, x):
    ...     loss = lambda adapted: jnp.mean(adapted(x) ** 2)
    ...     value, grads = nnx.value_and_grad(loss)(adapted)
    ...     optimizer.update(adapted, grads)
    ...     return value
    >>> bool(step(adapted, optimizer, x) > step(adapted, optimizer, x))
    True
    """

    def __init__(
        self,
        model: M,
        adapters: Adapters,
        *,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs | None = None,
        check_base: bool = True,
    ):
        _check_model(model)
        checks.check_number(dropout_rate, "dropout_rate", "in [0, 1)")
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be flax.nnx.Rngs: got {checks.shown(rngs)}")
        if dropout_rate and rngs is None:
            raise ValueError(f"dropout_rate={dropout_rate} needs rngs to draw from: got None")
        binding.bind(restore(nnx.state(model)), adapters, check_base=check_base)
        self.model = freeze(model)
        self.factors = nnx.data({path: _Factors(adapter) for path, adapter in adapters.items()})
        self.dropout_rate = float(dropout_rate)
        self.deterministic = False
        self.rngs = rngs["dropout"].fork() if rngs is not None and dropout_rate else None

    def __call__(self, *args: Any, method: call.Method = "__call__", **kwargs: Any) -> Any:
        """Run the module, or another method of it, with the adapters.

        Args:
            *args: arguments of the method; modules and `flax.nnx.Rngs` among them are updated.
            method: name of a method of the module, or a function of the module and the arguments,
                as ``Model.encode``.
            **kwargs: its keyword arguments.

        Returns:
            What the method returns.

        Raises:
            TypeError: there is no such method, or it is bound to a module already.
            ValueError: the method changes attributes of a module that are no arrays.
        """
        nodes, program = call.program(self.model, args, kwargs, method)
        params = self.params()
        if self.rngs is not None and not self.deterministic:
            params = dropout(params, self.rngs(), self.dropout_rate)
        out, changed, graphdef = call.run_low_rank(params, *program)
        call.write(nodes, changed, graphdef, self.factors)
        return out

    def params(self) -> PyTree:
        """Return ``flax.nnx.state`` of the module with a `jaxlora.LoRAWeight` at each target.

        Its parameters have their own types, as before they were held as `Frozen`.

        The other functions take it: `jaxlora.summary`, `jaxlora.save_merged`, `jaxlora.merge`.

        Raises:
            ValueError: a weight of the module is gone or has another shape.
        """
        adapters = {path: f.adapter() for path, f in self.factors.items()}
        return binding.bind(restore(nnx.state(self.model)), adapters)

    def adapters(self) -> Adapters:
        """Return the factors by path, for `jaxlora.save_adapters` or another `Adapted`."""
        return binding.split(self.params())[1]


def adapt(
    rngs: nnx.Rngs | jax.Array,
    model: M,
    /,
    *args: Any,
    config: LoRAConfig,
    dropout_rate: float = 0.0,
    method: call.Method = "__call__",
    **kwargs: Any,
) -> Adapted[M]:
    """Give a module fresh adapters; the output does not change.

    The module is traced with the arguments to see how it uses its weights. Nothing runs, and the
    module stays as it is; see `Adapted` for what is shared with it. It may be abstract, from
    `flax.nnx.eval_shape`.

    Args:
        rngs: `flax.nnx.Rngs`, of which ``params`` is drawn from, or a key from `jax.random.key`.
            The same key gives the same adapters as `jaxlora.init`.
        model: the module.
        *args: arguments of a call, arrays or `jax.ShapeDtypeStruct`.
        config: what to adapt and how; paths are those of ``flax.nnx.state(model)``.
        dropout_rate: share dropped of the low-rank path's input, in [0, 1).
        method: what a call runs: a method of the module by name, or a function of the module.
        **kwargs: keyword arguments of the call.

    Returns:
        The module with adapters.

    Raises:
        TypeError: rngs is neither, model is no module, or has no such method.
        ValueError: the module is adapted already, or the targets do not fit it (see `LoRAConfig`).

    >>> import jax.numpy as jnp, jaxlora.nnx
    >>> from flax import nnx
    >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1, targets=("kernel",))
    >>> adapted = jaxlora.nnx.adapt(nnx.Rngs(1), model, x, config=config)
    >>> adapted.adapters()
    {'kernel': Adapter(a=(4, 1), b=(1, 3), alpha=16)}
    >>> bool((adapted(x) == model(x)).all())
    True
    """
    _check_rngs(rngs)
    _check_model(model)
    checks.check_number(dropout_rate, "dropout_rate", "in [0, 1)")
    key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
    _, program = call.program(model, args, kwargs, method)
    state = restore(nnx.state(model))
    params = adapting.init(key, call.run, state, *program, config=config)
    base, adapters = binding.split(params)
    if any(adapter.changed for adapter in adapters.values()):
        model = nnx.merge(nnx.graphdef(model), base)
    streams = rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(rngs)
    return Adapted(model, adapters, dropout_rate=dropout_rate, rngs=streams)


def merge(adapted: Adapted[M]) -> M:
    """Return a plain module with the product of the factors in its weights.

    Args:
        adapted: a module with adapters; it stays as it is.

    Returns:
        A new module of the class of the adapted one, which shares no variable with it.

    Raises:
        TypeError: adapted is no `Adapted`.
        ValueError: a merged weight is not finite (see `jaxlora.merge`).

    >>> import jax.numpy as jnp, jaxlora.nnx
    >>> from flax import nnx
    >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> adapted = jaxlora.nnx.adapt(nnx.Rngs(1), model, x, config=config)
    >>> merged = jaxlora.nnx.merge(adapted)
    >>> type(merged).__name__, bool((merged(x) == model(x)).all())
    ('Linear', True)
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(
            f"adapted must be a jaxlora.nnx.Adapted: got {type(adapted).__name__}; what merge has "
            "returned is plain already, and a tree is merged with jaxlora.merge"
        )
    return nnx.merge(nnx.graphdef(adapted.model), merging.merge(adapted.params()))


def _check_rngs(rngs: object) -> None:
    if isinstance(rngs, nnx.Rngs):
        return
    if not isinstance(rngs, jax.Array) or not _is_key(rngs):
        got = "no array of keys" if isinstance(rngs, jax.Array) else type(rngs).__name__
        seed = rngs if isinstance(rngs, int) else 0
        raise TypeError(
            "the first argument, rngs, must be flax.nnx.Rngs or a key from jax.random.key: "
            f"got {got}; pass flax.nnx.Rngs({seed}) before the module"
        )


def _is_key(array: jax.Array) -> bool:
    """Tell whether an array is a random key, typed or of the old kind."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array.ndim == 0
    return array.dtype == jnp.uint32 and array.ndim == 1


def _check_model(model: PyTree) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module: got {type(model).__name__}; "
            "functions and Linen modules are adapted with jaxlora.init"
        )
    for path, leaf in call.leaves_of(model).items():
        if isinstance(leaf, Factor):
            raise ValueError(
                f"the module is adapted already, it holds the factor {call.name_of(path)!r}: "
                "a plain one is needed, as from jaxlora.nnx.merge"
            )
