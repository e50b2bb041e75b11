"""Plan a training run from shapes: the steps are traced and compiled, and never run."""

from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlora.messages import checks
from jaxlora.planning import layout, steps
from jaxlora.planning.costs import Plan, Step
from jaxlora.reports.counts import summary
from jaxlora.targets.config import LoRAConfig
from jaxlora.trees.adapting import init
from jaxlora.trees.binding import split
from jaxlora.trees.parting import parted
from jaxlora.trees.quantization import QuantizationConfig, quantize
from jaxlora.types import Function, Leaves, PyTree
from jaxlora.weights import memory, tree_checks
from jaxlora.weights.adapters import Adapters
from jaxlora.weights.quantized import QuantizedWeight

_ORDER = "plan(fn, params, *args, config=config, optimizer=optimizer)"


def plan(
    fn: Function,
    params: PyTree,
    /,
    *args: Any,
    config: LoRAConfig,
    optimizer: Any,
    mesh: Mesh | None = None,
    shardings: PyTree = None,
) -> Plan:
    """Tell what a training run will cost before it starts, and make no weights for it.

    The step that is planned is the one that a user jits: the gradients of adapters alone, the
    updates of the optimizer, adapters and state donated. It is compiled for the devices at hand,
    and its bytes are those that its compiler reports. Beside it stand full fine-tuning, with
    gradients of every floating leaf, and QLoRA, the same adapters over weights in nf4. Where one
    of these cannot be made, the plan says why.

    The operations are those of products and convolutions in the traced step: a multiplication and
    an addition are two, a scan counts as often as it runs, a loop of unknown length once, of
    branches the dearest. On a mesh they are divided by the sizes of the axes along which some
    argument is sharded.

    Args:
        fn: a loss of the parameters, or any function of them, as ``model.apply``: the loss is then
            the mean of the squares of its floating outputs. It is traced, not run.
        params: its first argument, plain: `jax.ShapeDtypeStruct`, or arrays, of which the shapes,
            dtypes and shardings are used.
        *args: its other arguments, likewise; what is no array is handed on as it is. On a mesh
            they are where they say.
        config: what to adapt and how.
        optimizer: an Optax transform.
        mesh: the devices; None for one, or for the mesh that the arrays or shardings are on.
        shardings: where the weights are on the mesh: a tree like params of
            `jax.sharding.NamedSharding`, `jax.sharding.PartitionSpec`, or None for what every
            device has. Without it they are where they say, and else on every device. Factors, and
            what the optimizer keeps for them, follow their weights.

    Warns:
        SkippedWeightWarning: as `jaxlora.init` does.

    Returns:
        The plan; ``print`` shows it.

    Raises:
        ValueError: the config does not fit the program; the state of the optimizer cannot be known
            from shapes; shardings do not fit params or have no mesh; there are two meshes; a
            weight is in host memory; fn returns nothing floating.
        TypeError: fn is no function or cannot be traced from shapes, params no tree of arrays,
            config no `LoRAConfig`, the optimizer has no ``init`` and ``update``, mesh is no mesh.

    >>> import jax, jax.numpy as jnp, jaxlora, optax
    >>> def loss(params, x):
    ...     return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)
    >>> shape = jax.ShapeDtypeStruct
    >>> params = {"up": shape((64, 256), jnp.float32), "down": shape((256, 64), jnp.float32)}
    >>> config = jaxlora.LoRAConfig(rank=4)
    >>> x = shape((8, 64), jnp.float32)
    >>> found = jaxlora.planning.plan(loss, params, x, config=config, optimizer=optax.adam(1e-3))
    >>> found.trained, found.total, found.lora.state_bytes
    (2560, 35328, 20484)
    """
    checks.check_function(fn, _ORDER)
    checks.check_config(config, LoRAConfig)
    _check_optimizer(optimizer)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh: got {checks.shown(mesh)}")
    leaves = tree_checks.check_tree(params, _ORDER)
    tree_checks.check_plain(leaves, "plan")
    if on_host := [path for path, leaf in leaves.items() if memory.is_on_host(leaf)]:
        raise ValueError(
            f"only weights on devices can be planned: {on_host[0]!r} is in host memory; give "
            "shapes without a place, and count the weights off yourself"
        )
    params, args = layout.abstract(params), layout.abstract(args)
    mesh = layout.mesh_of(mesh, shardings=shardings, params=params, args=args)
    params = layout.placed(params, mesh, shardings)
    steps.check_traces(fn, params, args)
    adapters = layout.of_factors(_adapters(fn, params, args, config), params, mesh)
    parameters = summary(params).total
    trained = summary(adapters)
    total = parameters + trained.trainable
    found = steps.compile_step(steps.adapted(fn, params, adapters, args), optimizer, mesh, total)
    others = {
        "full": lambda: steps.compile_step(
            _full(fn, params, args, leaves), optimizer, mesh, parameters
        ),
        "qlora": lambda: steps.compile_step(
            _quantized(fn, params, adapters, args, leaves), optimizer, mesh, total
        ),
    }
    made: dict[str, Step | None] = {}
    missing: dict[str, str] = {}
    for name, make in others.items():
        try:
            made[name] = make()
        except (ImportError, TypeError, ValueError) as error:
            made[name], missing[name] = None, steps.first_line(error)
        except RuntimeError as error:  # of JAX: no derivative, or no room on the device
            made[name], missing[name] = None, steps.said(error)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return Plan(
        lora=found,
        full=made["full"],
        qlora=made["qlora"],
        missing=MappingProxyType(missing),
        targets=trained.rows,
        devices=1 if mesh is None else mesh.size,
        platform=device.platform,
    )


def _check_optimizer(optimizer: object) -> None:
    has = [callable(getattr(optimizer, name, None)) for name in ("init", "update")]
    if not all(has) or isinstance(optimizer, type):
        raise TypeError(
            "optimizer must be an Optax transform with init and update, as optax.adamw(1e-4): "
            f"got {checks.shown(optimizer)}"
        )


def _adapters(fn: Function, params: PyTree, args: tuple[Any, ...], config: LoRAConfig) -> Adapters:
    """Return the abstract adapters that a config gives a model."""
    arrays, rebuild = parted(params)

    def made(key, arrays):
        return split(init(key, fn, rebuild(arrays), *args, config=config))[1]

    return jax.eval_shape(made, jax.eval_shape(lambda: jax.random.key(0)), arrays)


def _full(fn: Function, params: PyTree, args: tuple[Any, ...], leaves: Leaves) -> steps.Variant:
    if held := [path for path, leaf in leaves.items() if isinstance(leaf, QuantizedWeight)]:
        raise ValueError(f"{held[0]!r} is quantized, and has no gradient")
    return steps.full(fn, params, args)


def _quantized(
    fn: Function, params: PyTree, adapters: Adapters, args: tuple[Any, ...], leaves: Leaves
) -> steps.Variant:
    if held := [path for path, leaf in leaves.items() if isinstance(leaf, QuantizedWeight)]:
        raise ValueError(f"{held[0]!r} is quantized already: the step with adapters is over it")
    base = quantize(fn, params, *args, config=QuantizationConfig("nf4"))
    return steps.adapted(fn, layout.of_quantized(base, params), adapters, args)
