"""Quantize the frozen weights of a program, as QLoRA (Dettmers et al. 2023, arXiv:2305.14314)."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxlora.messages import checks
from jaxlora.targets.config import ALL_LINEAR, LoRAConfig, Targets
from jaxlora.targets.selection import select
from jaxlora.targets.sites import Site, find_sites
from jaxlora.tracing.recorder import Kind as UseKind
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import memory, paths, placed, quantized, sharding, tree_checks
from jaxlora.weights.nodes import LoRAWeight
from jaxlora.weights.quantized import Code, Kind, QuantizedWeight


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Which weights to quantize and how.

    Attributes:
        kind: what the codes are: ``"nf4"``, ``"int4"`` or ``"int8"``.
        block_size: the most elements that share a scale, at least 2. Blocks lie along an axis that
            the program sums over, or, of a table of rows, along the rows.
        double: also quantize the scales, to eight bits.
        targets: as in `LoRAConfig`, but whole weights alone.
        exclude: likewise, and wins over them.

    Raises:
        ValueError: there is no such kind, the block size is below 2, or targets are none.
        TypeError: the block size is not an int, double no bool, targets are not strings.
    """

    kind: Kind = "nf4"
    block_size: int = 64
    double: bool = True
    targets: Targets = ALL_LINEAR
    exclude: Targets = ()

    def __post_init__(self) -> None:
        checks.check_choice(self.kind, "kind", typing.get_args(Kind))
        checks.check_flag(self.double, "double")
        object.__setattr__(self, "block_size", checks.check_count(self.block_size, "block_size", 2))
        chosen = LoRAConfig(rank=1, targets=self.targets, exclude=self.exclude)
        object.__setattr__(self, "targets", chosen.targets)
        object.__setattr__(self, "exclude", chosen.exclude)


def quantize(
    fn: Function, params: PyTree, /, *args: Any, config: QuantizationConfig, **kwargs: Any
) -> PyTree:
    """Return the parameters with a `QuantizedWeight` in the place of each target.

    One weight at a time is quantized. They are frozen: `jaxlora.init` gives them adapters as any
    others, `jaxlora.lora` makes functions accept them, `jaxlora.merge` makes them plain. A program
    makes each where it reads it, and again to differentiate. (Except with the CPU compiler
    of JAX 0.10, which makes those of an unrolled program all at once and keeps them; those of
    layers that are scanned it does not.)

    Args:
        fn: the function that uses the parameters, as ``model.apply``; it is traced, not run.
        params: its first argument, arrays or `jax.ShapeDtypeStruct`, also adapted: the base of an
            adapted weight is quantized, and its factors stay.
        *args: its other arguments, or their shapes.
        config: what to quantize and how.
        **kwargs: its keyword arguments, except one named ``config``.

    Returns:
        The same tree with quantized weights. Their codes are sharded as the weights were.

    Raises:
        ValueError: the targets do not fit the program or name parts of weights, a weight is
            quantized already or trained whole, or is not finite.
        TypeError: fn is no function, params no tree of arrays, or config no `QuantizationConfig`.
        ImportError: qwix is not installed.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 128))
    >>> nf4, lora = jaxlora.QuantizationConfig("nf4"), jaxlora.LoRAConfig(rank=4)
    >>> base = jaxlora.quantize(model, {"w": jnp.ones((128, 64))}, x, config=nf4)
    >>> base
    {'w': QuantizedWeight(nf4, (128, 64), float32)}
    >>> params = jaxlora.init(jax.random.key(0), model, base, x, config=lora)
    >>> jaxlora.lora(model)(params, x).shape
    (2, 64)
    """
    order = "quantize(fn, params, *args, config=config)"
    checks.check_function(fn, order)
    tree_checks.check_tree(params, order)
    checks.check_config(config, QuantizationConfig)
    leaves, treedef = paths.flatten(params)
    sites = find_sites(fn, params, *args, **kwargs)
    code = Code(config.kind, config.block_size, config.double)
    for path, block, _, _ in select(
        LoRAConfig(rank=1, targets=config.targets, exclude=config.exclude), sites
    ):
        leaf, weight = leaves[path], paths.plain(leaves[path])
        if block is not None:
            raise ValueError(f"only whole weights can be quantized: got a part of {path!r}")
        if isinstance(weight, QuantizedWeight):
            raise ValueError(f"the leaf {path!r} is quantized already")
        if paths.is_trained(leaf) and not isinstance(leaf, LoRAWeight):
            raise ValueError(f"the leaf {path!r} is trained, and cannot be quantized: exclude it")
        made = _quantized(path, weight, code, _axis(sites[path]))
        leaves[path] = paths.with_base(leaf, made)
    return treedef.unflatten(leaves.values())


def dequantize(params: PyTree) -> PyTree:
    """Return a tree with plain weights in the place of quantized ones, also beneath the trained.

    Args:
        params: a tree with `QuantizedWeight` nodes.

    Raises:
        ValueError: no weight is quantized.
    """
    leaves, treedef = paths.flatten(params)
    found = {path: paths.plain(leaf) for path, leaf in leaves.items()}
    found = {path: leaf for path, leaf in found.items() if isinstance(leaf, QuantizedWeight)}
    if not found:
        raise ValueError("params has no quantized weight: make some with jaxlora.quantize")
    for path, weight in found.items():
        is_abstract = isinstance(weight.codes, jax.ShapeDtypeStruct)
        plain = weight.abstract if is_abstract else placed.plain(weight)
        leaves[path] = paths.with_base(leaves[path], plain)
    return treedef.unflatten(leaves.values())


def _axis(site: Site) -> int:
    """Return the axis for the blocks of a weight: the longest that it is summed over, or of rows.

    No entry or row that the program picks is then cut by a block.
    """
    is_table = any(use.kind == UseKind.LOOKED_UP for use in site.uses)
    axes = site.out if is_table and site.out else site.in_
    return max(axes, key=lambda axis: (site.shape[axis], axis))


def _quantized(path: str, weight: Leaf, code: Code, axis: int) -> QuantizedWeight:
    """Return a quantized weight, or the shapes of one; raise if it is not finite."""
    abstract = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    shapes, _ = jax.eval_shape(lambda weight: _made(weight, (code, axis)), abstract)
    if isinstance(weight, jax.ShapeDtypeStruct):
        return shapes
    axes = (sharding.even_axes(weight, shapes), ())
    found, finite = placed.run(_made, (code, axis), (weight,), weight, axes)
    if not isinstance(finite, Tracer) and not finite:
        raise ValueError(
            f"only finite weights can be quantized: {path!r} holds NaN or inf, or numbers next to "
            "the ends of float32"
        )
    return memory.beside(weight, found)


def _made(weight: jax.Array, how: tuple[Code, int]) -> tuple[QuantizedWeight, jax.Array]:
    found = quantized.quantized(weight, *how)
    return found, jnp.isfinite(weight).all() & jnp.isfinite(quantized.values(found)).all()
