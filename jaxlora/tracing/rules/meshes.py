"""Rules for operations that place weights on devices: shardings, copies, collectives, `shard_map`.

A factor has on a mesh the place of the axes of the base that it carries, and no place for the
rank, so what is done to the base's axes is done to the factors'.
"""

import dataclasses
import operator
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxlora.tracing.interpreter import Evaluation
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.registry import rule
from jaxlora.tracing.types import Base, Eqn, Value, Values
from jaxlora.tracing.values import axes, deferred, part_specs, placement
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.weight import Role, Weight, base_of

Place = Callable[[jax.Array, Sharding], jax.Array]
Spec = PartitionSpec | Deferred  # of an array, or of each that one is made of


def _placed(weight: Weight, base: Base, sharding: Sharding | None, place: Place) -> Weight:
    """Return a weight with its factors placed as the base is; other shardings concern it alone."""
    if not isinstance(sharding, NamedSharding):
        return weight.replace(base=base)
    fields = {"base": base}
    for name, factor in weight.arrays().items():
        spec = placement.spec_of(weight.dims, sharding, weight.carries[name].__contains__)
        if name != "keys" and spec is not None:
            spec = PartitionSpec(*spec[: factor.ndim])
            fields[name] = place(factor, _with_spec(sharding, spec))
    return weight.replace(**fields)


def _moved(value: Value, sharding: Sharding, place: Place) -> Value:
    """Return a value that is placed, its factors and all that a deferred base is made of too."""
    base = _on_mesh(base_of(value), sharding, place)
    return _placed(value, base, sharding, place) if isinstance(value, Weight) else base


@rule("sharding_constraint", passes=True)
def sharding_constraint(run: Evaluation, eqn: Eqn, value: Value) -> Values:
    """Constrain the factors along."""
    return [_moved(value, eqn.params["sharding"], lax.with_sharding_constraint)]


def _on_mesh(base: Base, sharding: Sharding, place: Place) -> Base:
    """Return a base that is placed; what is deferred, all it is made of where that has its axes."""
    specs = part_specs.of_whole(base, sharding) if isinstance(base, Deferred) else None
    if specs is None or not isinstance(sharding, NamedSharding):
        return deferred.lazily(lambda base: place(base, sharding), base)
    return jax.tree.map(lambda part, spec: place(part, _with_spec(sharding, spec)), base, specs)


def _with_spec(sharding: NamedSharding, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def constrained(value: Value, sharding: Sharding) -> Value:
    """Return a value with the sharding that an inner `jax.jit` asks for, if it asks for one."""
    if not isinstance(sharding, NamedSharding) or placement.explicit(base_of(value)):
        return value
    return _moved(value, sharding, lax.with_sharding_constraint)


@rule("reshard", passes=True)
def reshard(run: Evaluation, eqn: Eqn, value: Value) -> Values:
    """Move the factors along."""
    return [_moved(value, eqn.params["dst_sharding"], jax.sharding.reshard)]


@rule("device_put", passes=True)
def device_put(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Put the factors on the same devices."""
    moved = []
    for i, value in enumerate(values):
        device, base = eqn.params["devices"][i], base_of(value)
        if not isinstance(base, Deferred):
            of_one = {name: of_each[i : i + 1] for name, of_each in eqn.params.items()}
            (base,) = compat.bind(eqn.replace(params=of_one), [base])
        elif isinstance(device, NamedSharding):
            base = _on_mesh(base, device, jax.device_put)
        elif device is not None:
            base = jax.tree.map(lambda x, to=device: jax.device_put(x, to), base)
        if not isinstance(value, Weight):
            moved.append(base)
        elif device is None or isinstance(device, NamedSharding):
            moved.append(_placed(value, base, device, jax.device_put))
        else:
            factors = jax.tree.map(lambda x, to=device: jax.device_put(x, to), value.arrays())
            moved.append(value.replace(base=base, **factors))
    return moved


@rule("pvary", passes=True)
def vary(run: Evaluation, eqn: Eqn, value: Value) -> Values:
    """Let the factors vary over the mesh as the base does."""
    return [jax.tree.map(lambda x: compat.bind(eqn, [x])[0], value)]


@rule("ppermute", passes=True)
def permute(run: Evaluation, eqn: Eqn, value: Value) -> Values:
    """Send each array where the base goes, except one that is the same everywhere."""
    mesh_axes = set(eqn.params["axis_name"])

    def varies(x):
        return bool(mesh_axes & compat.varying(x))

    def send(x):
        return x if is_known and not varies(x) else compat.bind(eqn, [x])[0]

    is_known = any(map(varies, jax.tree.leaves(base_of(value))))  # else nothing says what varies
    return [jax.tree.map(send, value)]


def _gather(eqn: Eqn, x: jax.Array, axis: int) -> jax.Array:
    name, groups = eqn.params["axis_name"], eqn.params["axis_index_groups"]
    return lax.all_gather(x, name, axis=axis, tiled=True, axis_index_groups=groups)


def _gather_deferred(eqn: Eqn, base: Deferred) -> Deferred | None:
    """Gather all that a base is made of but what is the same everywhere, where that is known."""
    mesh_axes = set(eqn.params["axis_name"])
    codes = jax.tree.leaves(base)[0]
    if not (eqn.params["tiled"] and base.is_aligned and mesh_axes & compat.varying(codes)):
        return None
    axis = base.order[eqn.params["all_gather_dimension"]]

    def gather(part):
        return _gather(eqn, part, axis) if mesh_axes & compat.varying(part) else part

    return base.on_parts(gather, base.order)


@rule("all_gather", deferred=_gather_deferred)
def all_gather(run: Evaluation, eqn: Eqn, weight: Weight) -> Values:
    """Gather the shards of the factors along an axis."""
    dim = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"] or len(weight.dims[dim]) != 1:
        return run.without_rule(eqn, [weight], "it gathers along what is not one axis")
    base = deferred.bind(eqn, [weight.base])
    return [weight.along(dim, lambda x, axis: _gather(eqn, x, axis), base=base)]


@rule("shard_map", passes=True)
def shard_map(run: Evaluation, eqn: Eqn, *values: Value) -> Values:
    """Map the evaluation of the inner program over the shards; a shard of a weight is a weight."""
    params = eqn.params
    entered = [
        _Sharded.enter(run, eqn, value, NamedSharding(params["mesh"], spec))
        for value, spec in zip(values, params["in_specs"], strict=True)
    ]
    out_shardings = [NamedSharding(params["mesh"], spec) for spec in params["out_specs"]]
    left: list[_Sharded] = []

    def body(*parts):
        shards = [value.shard(part) for value, part in zip(entered, parts, strict=True)]
        outs = [*map(run.evaluator.leave, run.inner(eqn, params["jaxpr"], *shards))]
        left[:] = [_Sharded.leave(*pair) for pair in zip(outs, out_shardings, strict=True)]
        return [value.parts for value in left]

    def mapped(body, out_specs):
        return jax.shard_map(
            body,
            mesh=params["mesh"],
            in_specs=tuple(value.specs for value in entered),
            out_specs=out_specs,
            axis_names=params["newly_manual_axes"],
            check_vma=params["check_vma"],
        )

    parts = [value.placed() for value in entered]
    bases = mapped(lambda *parts: [out["base"] for out in body(*parts)], list(params["out_specs"]))
    jax.eval_shape(bases, *parts)  # tells what leaves it, and so where that goes
    outs = mapped(body, [value.specs for value in left])(*parts)
    return [value.whole(part) for value, part in zip(left, outs, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Sharded:
    """A value that enters or leaves a `shard_map`.

    Attributes:
        weight: the weight it is, with the dimensions of the whole, or None for an array.
        parts: its arrays by name.
        specs: where each goes.
        sharding: where the base goes.
    """

    weight: Weight | None
    parts: dict[str, Base]
    specs: dict[str, Spec]
    sharding: NamedSharding

    @classmethod
    def enter(cls, run: Evaluation, eqn: Eqn, value: Value, sharding: NamedSharding) -> "_Sharded":
        """Return a value that enters, dense where its factors cannot be sharded along."""
        base, spec = base_of(value), sharding.spec
        if isinstance(base, Deferred) and (spec := part_specs.of_shards(base, sharding)) is None:
            base, spec = deferred.now(base), sharding.spec
        if isinstance(value, Weight):
            value, specs = value.replace(base=base), _specs(value, sharding)
            if specs is not None:
                return cls(value, _arrays(value), specs | {"base": spec}, sharding)
            base = run.densify(eqn, value, "a shard cuts one of several axes of a dimension")
            spec = sharding.spec
        return cls(None, {"base": base}, {"base": spec}, sharding)

    @classmethod
    def leave(cls, value: Value, sharding: NamedSharding) -> "_Sharded":
        """Return a value that leaves, with the dimensions of the whole, and made if deferred."""
        base = deferred.now(base_of(value))
        if not isinstance(value, Weight):
            return cls(None, {"base": base}, {"base": sharding.spec}, sharding)
        value = value.replace(base=base)
        entries = [*sharding.spec, *[None] * len(value.dims)]
        opened = tuple(
            ((Role.STACK, 1),) if not dim and placement.shards(sharding, entry) > 1 else dim
            for dim, entry in zip(value.dims, entries, strict=False)
        )
        value = value.reshaped(value.base, opened)  # a shard of one entry was a stack's
        whole = value.replace(dims=_resized(value.dims, sharding, _times))
        specs = _specs(whole, sharding) or {}
        return cls(whole, _arrays(value), specs, sharding)

    def placed(self) -> dict[str, Base]:
        """Return the arrays where they have to be on a mesh with Explicit axes."""
        mesh = self.sharding.mesh
        if not mesh.explicit_axes:
            return self.parts
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs)
        return jax.tree.map(jax.sharding.reshard, self.parts, shardings)

    def shard(self, parts: dict[str, Base]) -> Value:
        """Return one shard."""
        if self.weight is None:
            return parts["base"]
        dims = tuple(map(self.weight.dim, _resized(self.weight.dims, self.sharding, _over)))
        return self.weight.replace(**parts).reshaped(parts["base"], dims)

    def whole(self, parts: dict[str, Base]) -> Value:
        """Return the value outside."""
        return parts["base"] if self.weight is None else self.weight.replace(**parts)


def _arrays(weight: Weight) -> dict[str, Base]:
    return {"base": weight.base, **weight.arrays()}


def _specs(weight: Weight, sharding: NamedSharding) -> dict[str, Spec] | None:
    """Return where each array of a weight goes, or None where a dimension is cut unevenly."""
    specs: dict[str, Spec] = {"base": sharding.spec}
    for name, array in weight.arrays().items():
        spec = placement.spec_of(weight.dims, sharding, weight.carries[name].__contains__)
        if spec is None:
            return None
        specs[name] = PartitionSpec(*spec[: array.ndim])
    return specs


def _resized(
    dims: axes.Dims, sharding: NamedSharding, resize: Callable[[int, int], int]
) -> axes.Dims:
    """Return dimensions of which the first piece is that of a shard, or of the whole."""
    entries = [*sharding.spec, *[None] * (len(dims) - len(sharding.spec))]
    counts = [placement.shards(sharding, entry) for entry in entries]
    return tuple(
        ((dim[0][0], resize(dim[0][1], count)), *dim[1:]) if dim else dim
        for dim, count in zip(dims, counts, strict=True)
    )


_over, _times = operator.floordiv, operator.mul
