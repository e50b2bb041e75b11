"""Rules for operations that take a part of a weight: slices, splits and lookups.

A part along an axis is the same part of each factor that carries the axis. So rows looked up of
a table ``(vocabulary, width)`` are rows of ``a``, and ``b`` stays as it is; an entry of a stack
is an entry of both.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.registry import rule
from jaxlora.tracing.types import Base, Eqn, Operand, Value, Values
from jaxlora.tracing.values import axes, deferred, slicing
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.weight import Role, Weight


def _cut_deferred(eqn: Eqn, x: Deferred, *starts: jax.Array) -> Base:
    cut: Base = x
    for dim, change, *operands in slicing.cuts(eqn, x.shape, *starts):
        cut = deferred.along(cut, dim, change, *operands)
    return cut


@rule("slice", deferred=_cut_deferred)
def slice_(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Cut a part out along some dimensions."""
    cut, picked, _ = _cut(run, eqn, weight)
    return [cut.scanned_over(picked) if isinstance(cut, Weight) else cut]  # as a loop takes it


@rule("dynamic_slice", deferred=_cut_deferred)
def dynamic_slice(run: Evaluation, eqn: Eqn, weight: Weight, *starts: jax.Array) -> Values:
    """Cut a part out along some dimensions, from where the program says."""
    cut, picked, smaller = _cut(run, eqn, weight, *starts)
    if not isinstance(cut, Weight):
        return [cut]
    indexed, windows = cut.indexed | picked, cut.windows | (smaller - picked)
    return [cut.replace(indexed=indexed, windows=windows, picked_at=compat.where(eqn))]


def _cut(
    run: Evaluation, eqn: Eqn, weight: Weight, *starts: jax.Array
) -> tuple[Operand, frozenset, frozenset]:
    """Cut a weight along every dimension that gets smaller.

    Returns:
        The part, the labels of the axes of which it has a single entry, and of those it cuts.
    """
    found = slicing.cuts(eqn, weight.shape, *starts)
    if any(len(weight.dims[d]) != 1 for d, *_ in found):
        reason = "it cuts what is not one axis"
        return run.without_rule(eqn, [weight, *starts], reason)[0], frozenset(), frozenset()
    smaller = [d for d, *_ in found]
    picked = [d for d in smaller if compat.shape(eqn.outvars[0])[d] == 1]
    labels = weight.labels(*picked), weight.labels(*smaller)
    for cut in found:
        weight = weight.along(*cut)
    return weight, *labels


@rule("split", passes=True)
def split(run: Evaluation, eqn: Eqn, value: Value) -> Values:
    """Cut a dimension into parts, each a low-rank weight."""
    axis, ends = eqn.params["axis"], list(itertools.accumulate(eqn.params["sizes"]))
    cuts = [slicing.between(*ends) for ends in itertools.pairwise([0, *ends])]
    if not isinstance(value, Weight):
        return [deferred.along(value, axis, cut) for cut in cuts]
    if len(value.dims[axis]) != 1:
        return run.without_rule(eqn, [value], "it splits a dimension of several axes")
    return [value.along(axis, cut) for cut in cuts]


@rule("unstack", passes=True)
def unstack(run: Evaluation, eqn: Eqn, value: Value) -> Values:
    """Take the entries along a dimension, each by the slice that it is."""
    axis = eqn.params["axis"]

    def entries(x):
        return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]

    return run.inner(eqn, jax.make_jaxpr(entries)(eqn.invars[0].aval), value)


def _gather_deferred(eqn: Eqn, x: Deferred, indices: jax.Array) -> Deferred | None:
    """Gather from each array it is made of, where that is the same."""
    sizes, shape = eqn.params["slice_sizes"], x.shape
    picked = {*eqn.params["dimension_numbers"].start_index_map}
    picked |= {dim for dim, size in enumerate(sizes) if size != shape[dim]}
    in_order = x.order == tuple(range(x.ndim))
    filling = eqn.params["fill_value"]
    of_zeros = getattr(x.parts, "offset", None) is None  # else zeros stand for another number
    is_filled = filling is not None and filling == filling and not (filling == 0 and of_zeros)
    if is_filled or not in_order or not all(map(x.has_whole, picked)):
        return None

    def gather(part):
        own = [size if dim in picked else part.shape[dim] for dim, size in enumerate(sizes)]
        params = eqn.params | {"slice_sizes": tuple(own)}
        if not jnp.issubdtype(part.dtype, jnp.floating):
            params["fill_value"] = 0  # where the index is out of range, the scale tells
        return eqn.primitive.bind(part, indices, **params)

    return x.on_parts(gather, tuple(range(len(compat.shape(eqn.outvars[0])))))


@rule("gather", deferred=_gather_deferred, is_heavy=True)
def gather(run: Evaluation, eqn: Eqn, weight: Operand, indices: jax.Array) -> Values:
    """Pick entries, or windows, by index along some dimensions and all of the others.

    The dimensions of the indices carry the role of what they pick: rows looked up of
    ``a`` (in, rank) are ``(tokens, rank)``, and ``b`` stays as it is.
    """
    if not isinstance(weight, Weight):
        return run.without_rule(eqn, [weight, indices], "it is an index")
    pick = _Pick(eqn, weight, indices)
    if reason := pick.obstacle():
        return run.without_rule(eqn, [weight, indices], reason)
    base = deferred.bind(eqn, [weight.base, indices])
    single = [d for d in pick.columns if pick.sizes[d] == 1]
    windows = [d for d in pick.columns if pick.sizes[d] != 1]
    fields = {"base": base, "dims": pick.dims(), "picked_at": compat.where(eqn)}
    indexed = weight.indexed | weight.labels(*single)
    for name, factor in weight.arrays().items():
        fields[name] = pick.of_factor(factor, weight.carries[name])
    if "keys" in fields and indexed - {Role.STACK}:
        fields["keys"] = None  # a lookup has no input to drop from
    windows = weight.windows | weight.labels(*windows)
    weight = weight.scanned_over(weight.labels(*pick.batching))
    return [weight.replace(indexed=indexed, windows=windows, **fields)]


Name = tuple[int | str, int]  # a dimension and its piece, or "index" and an axis of the indices
Named = tuple[axes.Label, int, Name]  # a piece: its label, its size and its name


class _Pick:
    """What a ``gather`` takes, by dimension of its operand and by axis of its indices.

    Attributes:
        columns: for each dimension that is indexed, its column of the indices.
        sizes: how much is taken along each dimension.
        batching: for each dimension that goes along with an axis of the indices, that axis.
    """

    def __init__(self, eqn: Eqn, weight: Weight, indices: jax.Array):
        numbers, self.mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        shape, self.sizes = weight.base.shape, tuple(eqn.params["slice_sizes"])
        is_checked = self.mode == lax.GatherScatterMode.FILL_OR_DROP
        self.weight, self.indices = weight, indices
        self.columns = {
            int(d): k
            for k, d in enumerate(numbers.start_index_map)
            if is_checked or self.sizes[d] != shape[d]  # else it always starts at 0
        }
        self.batching = {
            int(d): int(i)
            for d, i in zip(
                numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
            )
        }
        gone = {*map(int, numbers.collapsed_slice_dims), *self.batching}
        self.collapsed = gone - set(self.batching)
        self.window_dims = [d for d in range(len(shape)) if d not in gone]
        self.offsets = [*map(int, numbers.offset_dims)]
        self.touched = [
            d for d in range(len(shape)) if d in self.columns or self.sizes[d] != shape[d]
        ]

    def obstacle(self) -> str:
        """Return why the factors cannot follow, or nothing."""
        weight, ones = self.weight, [d for d in self.columns if self.weight.base.shape[d] == 1]
        if ones or any(len(weight.dims[d]) > 1 for d in self.touched):
            return "it indexes a dimension that is not one axis longer than 1"
        if not (self.columns or len(self.batching) == self.indices.ndim - 1):
            return "it repeats the weight"
        for carries in weight.carries.values():
            kept = [d for d in self.columns if weight.labels(d) & carries]
            if kept and not weight.labels(*self.batching) <= carries:
                return "it picks other entries for each entry of another axis"
        return ""

    def _label(self, axis: int) -> axes.Label:
        """Return the label of an axis of the indices: of what it goes along with, or picks."""
        dims = [d for d, i in self.batching.items() if i == axis] or list(self.columns)
        found = {label for d in dims for label, _ in self.weight.dims[d]}
        return next(iter(found)) if len(found) == 1 else self.weight.shared_label(found)

    def _names(self, kept: Callable[[axes.Label], bool]) -> list[list[Named]]:
        """Return for each dimension of the result the kept pieces, each with name and size."""
        windows, index_axes = iter(self.window_dims), iter(range(self.indices.ndim - 1))
        names = []
        for dim in range(len(self.window_dims) + self.indices.ndim - 1):
            if dim in self.offsets:
                d = next(windows)
                pieces = self.weight.dims[d]
                if d in self.touched:
                    pieces = tuple((label, self.sizes[d]) for label, _ in pieces)
                found = [(label, size, (d, j)) for j, (label, size) in enumerate(pieces)]
            else:
                axis = next(index_axes)
                found = [(self._label(axis), self.indices.shape[axis], ("index", axis))]
            names.append([(label, size, name) for label, size, name in found if kept(label)])
        return names

    def dims(self) -> axes.Dims:
        """Return the pieces of the result."""
        named = self._names(lambda label: True)
        return tuple(self.weight.dim((label, size) for label, size, _ in dim) for dim in named)

    def of_factor(self, factor: jax.Array, carries: frozenset) -> jax.Array:
        """Return what is picked of a factor, in the order of the result."""
        dims = enumerate(self.weight.dims)
        have: list[Name] = [
            (d, j) for d, dim in dims for j, piece in enumerate(dim) if piece[0] in carries
        ]
        columns = [(have.index((d, 0)), k) for d, k in self.columns.items() if (d, 0) in have]
        batching = [(have.index((d, 0)), i) for d, i in self.batching.items() if (d, 0) in have]
        sizes = list(factor.shape)
        for axis, (d, _) in enumerate(have):
            sizes[axis] = self.sizes[d] if d in self.touched else sizes[axis]
        if columns:
            picked, names = self._gathered(factor, have, columns, batching, sizes)
        else:
            for axis, _ in batching:
                sizes[axis] = factor.shape[axis]
            picked = lax.slice(factor, [0] * factor.ndim, sizes)
            along = {have[axis]: ("index", i) for axis, i in batching}
            names = [along.get(name, name) for name in have]
        pieces = [piece for dim in self._names(carries.__contains__) for piece in dim]
        wanted = [(size, name) for _, size, name in pieces if size != 1]
        order = [names.index(name) for _, name in wanted]
        order += [axis for axis in range(picked.ndim) if axis not in order]  # of size 1, and rank
        shape = [size for size, _ in wanted]
        return picked.transpose(order).reshape(*shape, *picked.shape[len(names) :])

    def _gathered(
        self,
        factor: jax.Array,
        have: list[Name],
        columns: list[tuple[int, int]],
        batching: list[tuple[int, int]],
        sizes: list[int],
    ) -> tuple[jax.Array, list[Name]]:
        """Return the gathered factor, the axes of the indices first, and the names of its axes."""
        lead = self.indices.ndim - 1
        collapsed = [axis for axis, (d, _) in enumerate(have) if d in self.collapsed]
        gone = [*collapsed, *(axis for axis, _ in batching)]
        batching = sorted(batching)
        picked = lax.gather(
            factor,
            self.indices[..., jnp.array([k for _, k in columns])],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(lead, lead + factor.ndim - len(gone))),
                collapsed_slice_dims=tuple(collapsed),
                start_index_map=tuple(axis for axis, _ in columns),
                operand_batching_dims=tuple(axis for axis, _ in batching),
                start_indices_batching_dims=tuple(i for _, i in batching),
            ),
            slice_sizes=sizes,
            mode=self.mode,
            fill_value=0,  # an entry that is filled in the base gets nothing from the factors
        )
        names = [("index", axis) for axis in range(lead)]
        return picked, names + [name for axis, name in enumerate(have) if axis not in gone]
