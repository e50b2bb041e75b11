"""Other ways to train the same factors of the same model, for side-by-side measurement."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import models

import jaxlora
from jaxlora.weights.adapters import Adapters

Variant = tuple[Callable[..., Any], Any, Any]  # loss (trained, frozen, x, y), trained, frozen


def per_call(model: nn.Module, adapters: Adapters, base: Any) -> Variant:
    """Return the loss that builds ``W + scaling * A@B`` on every call, as Keras does."""

    def build(leaf):
        if not isinstance(leaf, jaxlora.LoRAWeight):
            return leaf
        return leaf.base + (leaf.scaling * (leaf.a @ leaf.b)).astype(leaf.dtype)

    def loss(adapters, base, x, y):
        params = jax.tree.map(
            build,
            jaxlora.bind(base, adapters),
            is_leaf=lambda leaf: isinstance(leaf, jaxlora.LoRAWeight),
        )
        return models.loss(model.apply(params, x), y)

    return loss, adapters, base


def naive(model: nn.Module, adapters: Adapters, base: Any) -> Variant:
    """Return the loss that adds ``(x A) B`` to the output of a layer, as most examples do."""

    def loss(adapters, base, x, y):
        def add(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            adapter = adapters.get("/".join(("params", *context.module.path, "kernel")))
            if adapter is None or context.method_name != "__call__":
                return out
            a, b = adapter.a.astype(out.dtype), adapter.b.astype(out.dtype)
            return out + (args[0] @ a) @ b * (adapter.alpha / adapter.rank)

        with nn.intercept_methods(add):
            return models.loss(model.apply(base, x), y)

    return loss, adapters, base


def has_qwix() -> bool:
    """Tell whether qwix is installed in this environment."""
    return importlib.util.find_spec("qwix") is not None


def qwix(
    model: nn.Module,
    params: Any,
    x: jax.Array,
    targets: Sequence[str],
    rank: int,
    alpha: float,
) -> Variant:
    """Return the loss of the model as qwix adapts it; its factors are drawn, b as well."""
    loss, factors, _ = qwix_shapes(model, x, targets, rank, alpha)
    keys = iter(jax.random.split(jax.random.key(6), len(factors)))
    factors = jax.tree.map(lambda f: 0.01 * jax.random.normal(next(keys), f.shape), factors)
    frozen = flax.traverse_util.flatten_dict(params)
    check_all_adapted(factors, sum(keys[-1] == "kernel" for keys in frozen))
    return loss, factors, frozen


def qwix_shapes(
    model: nn.Module, x: Any, targets: Sequence[str], rank: int, alpha: float, **options: Any
) -> Variant:
    """Return the same without arrays: the shapes of the factors, and of what is left of a model.

    Args:
        model: the model.
        x: its input, or the shape of it.
        targets: names of the modules that are adapted.
        rank: rank of the factors.
        alpha: numerator of the scaling.
        **options: of `qwix.LoraRule`.
    """
    import qwix

    rule = qwix.LoraRule(module_path=f".*({'|'.join(targets)})", rank=rank, alpha=alpha, **options)
    adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]))
    shapes = jax.eval_shape(adapted.init, jax.random.key(5), x)
    leaves = flax.traverse_util.flatten_dict(shapes)
    factors = {keys: leaf for keys, leaf in leaves.items() if "lora" in keys[-1]}
    frozen = {keys: leaf for keys, leaf in leaves.items() if keys not in factors}

    def loss(factors, frozen, x, y):
        variables = flax.traverse_util.unflatten_dict({**frozen, **factors})
        return models.loss(adapted.apply(variables, x), y)

    return loss, factors, frozen


def check_all_adapted(factors: Any, count: int) -> None:
    """Raise if qwix left out some of this many weights, which it does in silence."""
    if len(factors) != 2 * count:
        raise RuntimeError(f"qwix adapts {len(factors) // 2} weights, not {count}")
