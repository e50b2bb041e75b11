"""Run an NNX module on a state with adapted weights, and give it back what it changed."""

import functools
import inspect
import operator
from collections.abc import Collection

import jax
from flax import nnx
from jax.tree_util import KeyPath

from jaxlora.messages import checks
from jaxlora.nnx.frozen import freeze
from jaxlora.tracing.transform import lora
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import blocks

Method = Function | str
_NODE = object()  # stands for a module among the arguments of a call


def leaves_of(nodes: PyTree) -> dict[KeyPath, Leaf]:
    """Return the variables of modules by path, and the arrays that are attributes."""
    return dict(nnx.to_flat_state(nnx.state(nodes)))


def is_node(leaf: Leaf) -> bool:
    """Tell whether an argument is a module or a variable, which NNX splits."""
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def name_of(path: tuple) -> str:
    """Return the path of a variable as the rest of the library writes it."""
    return "/".join(map(str, path))


def program(model: PyTree, args: tuple, kwargs: dict, method: Method) -> tuple[list, tuple]:
    """Return the modules of a call, the model first, and what `run` takes beside its state."""
    if inspect.ismethod(method) or not (isinstance(method, str) or checks.is_function(method)):
        is_bound = inspect.ismethod(method)
        got = f"{method.__qualname__!r} bound to a module" if is_bound else checks.shown(method)
        raise TypeError(
            f"method must be a name or a function that takes the module, as Model.encode: got {got}"
        )
    if isinstance(method, str) and not callable(getattr(model, method, None)):
        raise TypeError(f"method must be one of {type(model).__name__}: got {method!r}")
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    nodes = [model, *filter(is_node, leaves)]
    values = treedef.unflatten(_NODE if is_node(leaf) else leaf for leaf in leaves)
    graphdef, state = nnx.split(nodes)
    rest = {key: value for key, value in state.items() if key != 0}
    return nodes, (rest, values, graphdef, method)


def run(
    params: PyTree, rest: dict, values: tuple, graphdef: PyTree, method: Method
) -> tuple[PyTree, PyTree, PyTree]:
    """Call a module given by its state; return also what it changed, and its new graphdef.

    The state has the types that the module's own code expects, where graphdef may have `Frozen`;
    the graphdef returned has `Frozen` in the place of every parameter, as `write` compares it.

    Only what changed is returned, for a module that changes nothing may be closed over. What a
    transform inside of the module gives back counts as changed (`flax.nnx.remat` returns all it
    was given), so weights stay out of it: their copies would take as much memory as the base.
    """
    nodes = nnx.merge(graphdef, nnx.State({0: params, **rest}))
    before = {path: jax.tree.flatten(leaf) for path, leaf in leaves_of(nodes).items()}
    model, others = nodes[0], iter(nodes[1:])
    args, kwargs = jax.tree.map(lambda leaf: next(others) if leaf is _NODE else leaf, values)
    call = getattr(model, method) if isinstance(method, str) else functools.partial(method, model)
    out = call(*args, **kwargs)
    changed = {}
    for path, leaf in leaves_of(nodes).items():
        old, new = before.get(path), jax.tree.flatten(leaf)
        is_same = old and old[1] == new[1] and all(map(operator.is_, old[0], new[0]))
        if not is_same and not (path[0] == 0 and isinstance(leaf, nnx.Param)):
            changed[path] = leaf
    return out, nnx.from_flat_state(changed), nnx.graphdef(freeze(nodes))


run_low_rank = lora(run)


def write(nodes: list, changed: PyTree, graphdef: PyTree, adapted: Collection[str]) -> None:
    """Write what a call changed to the modules it was called with, except adapted weights."""
    current, written = leaves_of(nodes), {}
    for path, leaf in nnx.to_flat_state(changed):
        name = f"{name_of(path[1:])}/"
        if path[0] == 0 and any(
            f"{blocks.parse(weight)[0]}/".startswith(name) for weight in adapted
        ):
            continue
        if isinstance(variable := current.get(path), nnx.Variable):
            variable.set_raw_value(variable.get_raw_value())  # raises inside of another trace
        written[path] = leaf
    nnx.update(nodes, nnx.from_flat_state(written))
    if nnx.graphdef(freeze(nodes)) != graphdef:
        raise ValueError(
            f"the call changes attributes of {type(nodes[0]).__name__} that are no arrays, or adds "
            "modules or weights: only the state of variables may change"
        )
