"""Models whose training is planned, as shapes alone, and the step that their user compiles."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import bert
import jax
import jax.numpy as jnp
import llama
import models
import optax

import jaxlora

KEY = jax.random.key(0)
OPTIMIZER = optax.adamw(1e-4)


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss, the shapes of its parameters and of its data, and what to adapt."""

    loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    config: jaxlora.LoRAConfig


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def benchmark(*, layers=6, scan=False):
    """Return the model of benchmarks/train_step.py in its sizes."""
    model = models.Transformer(layers, heads=6, hidden=1536, scan=scan)
    x = shape(8, 128, 384)

    def loss(params, x, y):
        return models.loss(model.apply(params, x), y)

    params = jax.eval_shape(model.init, KEY, x)
    return Model(loss, params, (x, x), jaxlora.LoRAConfig(rank=8, targets=models.TARGETS))


def minilm():
    """Return the classifier of examples/sentiment.py, on MiniLM."""
    model, tokens, mask = (
        bert.Classifier(),
        shape(16, 64, dtype=jnp.int32),
        shape(16, 64, dtype=bool),
    )

    def loss(params, tokens, mask, labels):
        logits = model.apply(params, tokens, mask)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    params = jax.eval_shape(model.init, KEY, tokens, mask)
    config = jaxlora.LoRAConfig(rank=8, targets=("query", "value"))
    return Model(loss, params, (tokens, mask, shape(16)), config)


def scanned(*, layers=32, batch=1):
    """Return a decoder in the sizes of Llama 2 7B, its layers scanned."""
    sizes = {"width": 4096, "hidden": 11008, "vocabulary": 32000}
    params = llama.shapes(argparse.Namespace(layers=layers, **sizes))

    def loss(params, tokens):
        return llama.next_tokens(llama.forward(params, tokens[:, :-1], 32), tokens)

    config = jaxlora.LoRAConfig(rank=16, exclude=("embed",))
    return Model(loss, params, (shape(batch, 513, dtype=jnp.int32),), config)


def user_step(loss, optimizer=OPTIMIZER):
    """Return the step that a user jits, of adapters, state, base and the rest."""

    def step(adapters, state, base, *args):
        def of_adapters(adapters):
            return jaxlora.lora(loss)(jaxlora.bind(base, adapters), *args)

        value, grads = jax.value_and_grad(of_adapters)(adapters)
        updates, state = optimizer.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def full_step(loss, optimizer=OPTIMIZER):
    """Return the step that a user jits to train every parameter."""

    def step(params, state, *args):
        value, grads = jax.value_and_grad(loss)(params, *args)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def user_memory(model, params):
    """Return what the compiler reports of the user's step over some parameters, as shapes."""
    made = jax.eval_shape(
        lambda: jaxlora.init(KEY, model.loss, params, *model.args, config=model.config)
    )
    base, adapters = jaxlora.split(made)
    state = jax.eval_shape(OPTIMIZER.init, adapters)
    return memory(user_step(model.loss).lower(adapters, state, base, *model.args).compile())


def full_flops(plan):
    """Return the operations of a step of full fine-tuning, which there has to be."""
    assert plan.full is not None, plan.missing
    return plan.full.flops


def xla_flops(compiled):
    """Return XLA's own count of operations."""
    cost: Any = compiled.cost_analysis()
    return cost["flops"]


def memory(compiled):
    found = compiled.memory_analysis()
    return {
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "temp_bytes": found.temp_size_in_bytes,
    }


def check_near(step, wanted, share=0.05):
    """Check that a planned step has the bytes of one that was compiled."""
    for name, value in wanted.items():
        assert abs(getattr(step, name) - value) <= share * value, (name, step, wanted)
