"""The training steps that are planned, as a user jits them, and what compiling them tells.

A step takes what is trained, the state of the optimizer, the frozen weights and the data, and
returns what is trained and the state anew, which take the place of the old ones, and the loss.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlora.messages.checks import shown
from jaxlora.planning import layout, operations
from jaxlora.planning.costs import Step
from jaxlora.tracing.program import is_array
from jaxlora.tracing.transform import lora
from jaxlora.trees.binding import bind
from jaxlora.trees.parting import parted
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights.adapters import Adapters

Args = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train a model, in abstract arrays.

    Attributes:
        loss: of ``(trained, base, data)``, one floating number.
        trained: the tree that is trained.
        base: the arrays that are frozen.
        data: the arrays among the other arguments.
    """

    loss: Function
    trained: PyTree
    base: list[Leaf]
    data: list[Leaf]


def adapted(fn: Function, base: PyTree, adapters: Adapters, args: Args) -> Variant:
    """Return the step that trains adapters over a frozen base, also one that is quantized."""
    frozen, base_of = parted(base)
    data, args_of = parted(args)
    run = lora(fn)

    def loss(adapters, frozen, data):
        # adapters on codes were made for what these stand for
        tree = bind(base_of(frozen), adapters, check_base=False)
        return loss_of(run(tree, *args_of(data)))

    return Variant(loss, adapters, frozen, data)


def full(fn: Function, params: PyTree, args: Args) -> Variant:
    """Return the step that trains every floating leaf."""

    def is_trained(leaf):
        return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)

    trained = jax.tree.map(lambda leaf: leaf if is_trained(leaf) else None, params)
    rest, rest_of = parted(jax.tree.map(lambda leaf: None if is_trained(leaf) else leaf, params))
    data, args_of = parted(args)
    leaves, treedef = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if is_trained(leaf)]

    def loss(trained, rest, data):
        found, others = iter(jax.tree.leaves(trained)), iter(jax.tree.leaves(rest_of(rest)))
        filled = [next(found) if i in places else next(others) for i in range(len(leaves))]
        return loss_of(fn(treedef.unflatten(filled), *args_of(data)))

    return Variant(loss, trained, rest, data)


def loss_of(result: PyTree) -> jax.Array:
    """Return a result that is one floating number, or the mean square of its floating arrays."""
    leaves = jax.tree.leaves(result)
    floating = [x for x in leaves if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)]
    if not floating:
        raise ValueError(f"fn must return a loss or floating arrays: got {shown(result)}")
    if len(leaves) == 1 and not floating[0].shape:
        return floating[0]
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in floating]
    return jnp.sum(jnp.stack(squares)) / sum(x.size for x in floating)


def check_traces(fn: Function, params: PyTree, args: Args) -> None:
    """Raise if a function cannot be traced from shapes, or returns nothing that can be trained."""
    arrays, rebuild = parted((params, args))

    def run(*arrays):
        params, args = rebuild(arrays)
        return loss_of(lora(fn)(params, *args))

    try:
        jax.eval_shape(run, *arrays)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise TypeError(
            "fn cannot be traced from shapes: what it does must not depend on values of arrays, "
            f"as an `if` of one does; make such arguments Python values: JAX said: {said(error)}"
        ) from error


def said(error: Exception) -> str:
    """Return the type of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, without the period that may end it."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


def state_of(optimizer: Any, trained: PyTree) -> PyTree:
    """Return the abstract state of an optimizer, or raise if shapes do not tell it or its updates.

    Raises:
        ValueError: it cannot be started or updated with shapes alone.
    """
    try:
        state = jax.eval_shape(optimizer.init, trained)
    except Exception as error:
        raise ValueError(
            "the state of the optimizer cannot be known from shapes: its init must take what is "
            f"trained, abstract: it said: {said(error)}"
        ) from error
    try:
        jax.eval_shape(optimizer.update, trained, state, trained)
    except Exception as error:
        raise ValueError(
            "the optimizer must update from gradients, its state and what is trained alone: it "
            f"said: {said(error)}"
        ) from error
    return state


def compile_step(variant: Variant, optimizer: Any, mesh: Mesh | None, total: int) -> Step:
    """Compile the step of a variant, and return what it costs.

    Args:
        variant: the variant.
        optimizer: an Optax transform.
        mesh: the devices, None for one.
        total: parameters in all.
    """
    import optax

    state = layout.of_state(state_of(optimizer, variant.trained), variant.trained, mesh)

    def step(trained, state, base, data):
        value, grads = jax.value_and_grad(variant.loss)(trained, base, data)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    arguments = (variant.trained, state, variant.base, variant.data)
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    compiled = traced.lower().compile()
    memory: Any = compiled.memory_analysis()
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    if memory is None:
        raise ValueError(
            f"the compiler for {platform!r} reports no memory: choose another platform"
        )
    arrays = [jax.tree.leaves(argument) for argument in arguments]
    known = [  # None for what is not read
        jax.tree.structure(argument).flatten_up_to(found)
        for argument, found in zip(arguments, compiled.input_shardings[0], strict=True)
    ]
    sizes = [layout.nbytes(*pair) for pair in zip(arrays, known, strict=True)]
    shared = layout.parts(place for places in known for place in places)
    return Step(
        trained=sum(x.size for x in arrays[0]),
        total=total,
        trained_bytes=sizes[0],
        state_bytes=sizes[1],
        base_bytes=sizes[2],
        data_bytes=sizes[3],
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=operations.count(traced.jaxpr, platform) // shared,
    )
