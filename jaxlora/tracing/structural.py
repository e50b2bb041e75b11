"""Rules for operations that only reshape, convert or pick from a weight.

Each runs the program's own operation on the base and does to the factors what that means for
the pieces they carry. What comes out is a low-rank weight again.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing import axes, compat
from jaxlora.tracing.interpreter import Walk, rule
from jaxlora.tracing.lowrank import CARRIES, LowRank, Role


def _on_base(eqn: Any, weight: LowRank, *operands: Any) -> Any:
    (base,) = compat.bind(eqn, [weight.base, *operands])
    return base


@rule("convert_element_type", "reduce_precision")
def convert(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Convert the base; the factors keep their dtype until a product needs them."""
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return walk.without_rule(eqn, [weight], "the result is not floating")
    return [weight.replace(base=_on_base(eqn, weight))]


@rule("copy", "copy_p", "name", "sharding_constraint")
def keep(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Do to the base what changes no value."""
    return [weight.replace(base=_on_base(eqn, weight))]


@rule("stop_gradient")
def stop_gradient(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Stop the gradient of the factors too."""
    return [jax.tree.map(lax.stop_gradient, weight)]


@rule("optimization_barrier")
def optimization_barrier(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """Put the bases and the factors behind one barrier."""
    return list(lax.optimization_barrier(values))


@rule("transpose")
def transpose(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Permute the dimensions."""
    return [weight.transposed(_on_base(eqn, weight), eqn.params["permutation"])]


@rule("reshape")
def reshape(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Split and join dimensions."""
    dims = axes.reshape(weight.dims, eqn.params["new_sizes"])
    if dims is None:
        return walk.without_rule(eqn, [weight], "the reshape cuts an axis unevenly")
    return [weight.reshaped(_on_base(eqn, weight), dims)]


@rule("squeeze")
def squeeze(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Drop dimensions of size 1."""
    gone = eqn.params["dimensions"]
    dims = tuple(dim for d, dim in enumerate(weight.dims) if d not in gone)
    return [weight.replace(base=_on_base(eqn, weight), dims=dims)]


@rule("broadcast_in_dim")
def expand(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Add dimensions of size 1."""
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dims: list[axes.Dim] = [()] * len(shape)
    for d, dim in zip(kept, weight.dims, strict=True):
        dims[d] = dim
    if axes.shape(tuple(dims)) != tuple(shape):
        return walk.without_rule(eqn, [weight], "it repeats the weight along a new dimension")
    return [weight.replace(base=_on_base(eqn, weight), dims=tuple(dims))]


@rule("rev")
def rev(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Reverse dimensions, one after the other."""
    if any(len(weight.dims[d]) > 1 for d in eqn.params["dimensions"]):
        return walk.without_rule(eqn, [weight], "it reverses a dimension of several axes")
    for d in eqn.params["dimensions"]:
        if weight.dims[d]:
            weight = weight.along(
                lax.rev(weight.base, (d,)), d, lambda x, axis: lax.rev(x, (axis,))
            )
    return [weight]


@rule("slice")
def slice_(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Cut a part out along some dimensions."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)

    def part(d):
        return functools.partial(_slice_in_dim, start=starts[d], end=limits[d], stride=strides[d])

    cut, picked = _cut(walk, eqn, weight, eqn.outvars[0].aval.shape, part)
    if isinstance(cut, LowRank) and cut.is_probe:  # one entry of a stack, as a loop takes it
        cut = cut.replace(scanned=cut.scanned | picked)
    return [cut]


@rule("dynamic_slice")
def dynamic_slice(walk: Walk, eqn: Any, weight: Any, *starts: Any) -> list[Any]:
    """Cut a part out along some dimensions, from where the program says."""
    sizes = eqn.params["slice_sizes"]

    def part(d):
        return lambda x, axis: lax.dynamic_slice_in_dim(
            x, starts[d], sizes[d], axis, allow_negative_indices=False
        )

    cut, picked = _cut(walk, eqn, weight, sizes, part, *starts)
    if not isinstance(cut, LowRank):
        return [cut]
    return [cut.replace(indexed=cut.indexed | picked, picked_at=compat.where(eqn))]


def _cut(
    walk: Walk, eqn: Any, weight: LowRank, sizes: Any, part: Any, *operands: Any
) -> tuple[Any, frozenset]:
    """Apply ``part(d)`` along every dimension d that gets smaller.

    Returns:
        The part, and the labels of the axes of which it has a single entry.
    """
    smaller = [d for d, size in enumerate(sizes) if size != weight.base.shape[d]]
    if any(len(weight.dims[d]) > 1 for d in smaller):
        reason = "it cuts a dimension of several axes"
        return walk.without_rule(eqn, [weight, *operands], reason)[0], frozenset()
    picked = axes.labels([weight.dims[d] for d in smaller if sizes[d] == 1])
    for d in smaller:
        weight = weight.along(part(d)(weight.base, d), d, part(d))
    return weight, frozenset(picked)


@rule("gather")
def gather(walk: Walk, eqn: Any, weight: Any, indices: Any) -> list[Any]:
    """Pick entries by index along some dimensions and all of the others.

    The dimensions of the indices carry the role of what they pick: rows looked up of
    ``a`` (in, rank) are ``(tokens, rank)``, and ``b`` stays as it is.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    picked = numbers.start_index_map
    cut = any(size != weight.base.shape[d] for d, size in enumerate(sizes) if d not in picked)
    if cut or sorted(picked) != sorted(numbers.collapsed_slice_dims):
        return walk.without_rule(eqn, [weight, indices], "it gathers parts of rows")
    if numbers.operand_batching_dims:
        return walk.without_rule(eqn, [weight, indices], "it gathers in batches")
    if any(len(weight.dims[d]) != 1 for d in picked):
        reason = "it indexes a dimension that is not one axis longer than 1"
        return walk.without_rule(eqn, [weight, indices], reason)

    base = _on_base(eqn, weight, indices)
    found = axes.labels([weight.dims[d] for d in picked])
    label = next(iter(found)) if len(found) == 1 else Role.STACK
    rest = iter(weight.dims[d] for d in range(len(sizes)) if d not in picked)
    dims = tuple(
        next(rest) if d in numbers.offset_dims else (((label, size),) if size != 1 else ())
        for d, size in enumerate(base.shape)
    )
    fields = {"base": base, "dims": dims, "picked_at": compat.where(eqn)}
    for name, carries in CARRIES.items():
        if (factor := getattr(weight, name)) is not None:
            fields[name] = _gather_factor(eqn, weight, factor, carries, indices, dims)
    return [weight.replace(indexed=weight.indexed | found, **fields)]


def _gather_factor(
    eqn: Any, weight: LowRank, factor: Any, carries: frozenset, indices: Any, dims: axes.Dims
) -> Any:
    """Gather from a factor what ``gather`` takes from the dimensions that it carries."""
    numbers = eqn.params["dimension_numbers"]
    kept = [tuple(piece for piece in dim if piece[0] in carries) for dim in weight.dims]
    first = [len(axes.pieces(tuple(kept[:d]))) for d in range(len(kept))]
    columns = [k for k, d in enumerate(numbers.start_index_map) if kept[d]]
    if not columns:
        return factor
    collapsed = [first[numbers.start_index_map[k]] for k in columns]
    batch = indices.ndim - 1
    rows = lax.gather(
        factor,
        indices[..., jnp.array(columns)],
        lax.GatherDimensionNumbers(
            offset_dims=tuple(range(batch, batch + factor.ndim - len(collapsed))),
            collapsed_slice_dims=tuple(sorted(collapsed)),
            start_index_map=tuple(collapsed),
        ),
        slice_sizes=[1 if i in collapsed else n for i, n in enumerate(factor.shape)],
        mode=eqn.params["mode"],
        fill_value=0,  # an entry that is filled in the base gets nothing from the factors
    )
    index_axes, rest_axes = iter(range(batch)), iter(range(batch, rows.ndim))
    rest = iter(kept[d] for d in range(len(kept)) if d not in numbers.start_index_map)
    order = []
    for d in range(len(dims)):
        if d in numbers.offset_dims:
            order += [next(rest_axes) for _ in next(rest)]
        else:
            order.append(next(index_axes))
    sizes = [size for piece, size in axes.pieces(dims) if piece in carries]
    rows = rows.transpose(*order, *rest_axes)
    return rows.reshape(*sizes, *rows.shape[len(order) :])


@rule("split")
def split(walk: Walk, eqn: Any, weight: LowRank) -> list[Any]:
    """Cut a dimension into parts, each a low-rank weight."""
    axis, ends = eqn.params["axis"], list(itertools.accumulate(eqn.params["sizes"]))
    if len(weight.dims[axis]) != 1:
        return walk.without_rule(eqn, [weight], "it splits a dimension of several axes")
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        cut = functools.partial(_slice_in_dim, start=start, end=end)
        parts.append(weight.along(cut(weight.base, axis), axis, cut))
    return parts


def _slice_in_dim(x: Any, axis: int, *, start: int, end: int, stride: int = 1) -> Any:
    return lax.slice_in_dim(x, start, end, stride, axis)
