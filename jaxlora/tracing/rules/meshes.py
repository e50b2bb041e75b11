"""Rules for operations that place weights on devices: shardings, copies, collectives, `shard_map`.

A factor has on a mesh the place of the axes of the base that it carries, and no place for the
rank, so what is done to the base's axes is done to the factors'.
"""

import dataclasses
import operator
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.tracing.interpreter import Evaluation, rule
from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.values import axes, deferred, placement
from jaxlora.tracing.values.deferred import Deferred
from jaxlora.tracing.values.lowrank import CARRIES, LowRank, Role


def _placed(weight: LowRank, base: Any, sharding: Any, place: Any) -> LowRank:
    """Return a weight with its factors placed as the base is; other shardings concern it alone."""
    if not isinstance(sharding, NamedSharding):
        return weight.replace(base=base)
    fields = {"base": base}
    for name in ("a", "b", "gain"):
        spec = placement.spec_of(weight.dims, sharding, CARRIES[name].__contains__)
        if (factor := getattr(weight, name)) is not None and spec is not None:
            spec = PartitionSpec(*spec[: factor.ndim])
            fields[name] = place(factor, NamedSharding(sharding.mesh, spec))
    return weight.replace(**fields)


@rule("sharding_constraint")
def sharding_constraint(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Constrain the factors along."""
    sharding = eqn.params["sharding"]
    base = _on_mesh(weight.base, sharding, lax.with_sharding_constraint)
    return [_placed(weight, base, sharding, lax.with_sharding_constraint)]


def _on_mesh(base: Any, sharding: Any, place: Any) -> Any:
    """Return a base that is placed; what is deferred, all it is made of where that has its axes."""
    specs = _specs_of_parts(base, sharding) if isinstance(base, Deferred) else None
    if specs is None:
        return deferred.lazily(lambda base: place(base, sharding), base)
    return jax.tree.map(
        lambda part, spec: place(part, NamedSharding(sharding.mesh, spec)), base, specs
    )


def _specs_of_parts(base: Deferred, sharding: Any) -> Deferred | None:
    """Return where each part of a base goes, or None where one cannot be cut as the base."""
    in_order = base.order == tuple(range(base.ndim))
    if not isinstance(sharding, NamedSharding) or not base.is_aligned or not in_order:
        return None
    cuts = [(axis, placement.shards(sharding, entry)) for axis, entry in enumerate(sharding.spec)]
    codes, *scales = jax.tree.leaves(base)
    sizes = [(codes.shape[axis], count) for axis, count in cuts]
    sizes += [(x.shape[axis], n) for x in scales for axis, n in cuts if x.shape[axis] != 1]
    if any(size % count for size, count in sizes):
        return None

    def spec(part):
        sizes = zip(part.shape, sharding.spec, strict=False)
        return PartitionSpec(*(None if size == 1 else entry for size, entry in sizes))

    return jax.tree.map(spec, base)


def constrained(value: Any, sharding: Any) -> Any:
    """Return a value with the sharding that an inner `jax.jit` asks for, if it asks for one."""
    if not isinstance(sharding, NamedSharding) or placement.explicit(getattr(value, "base", value)):
        return value
    base = _on_mesh(getattr(value, "base", value), sharding, lax.with_sharding_constraint)
    if not isinstance(value, LowRank):
        return base
    return _placed(value, base, sharding, lax.with_sharding_constraint)


@rule("reshard")
def reshard(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Move the factors along."""
    base = deferred.bind(eqn, [weight.base])
    return [_placed(weight, base, placement.typed(base), jax.sharding.reshard)]


@rule("device_put")
def device_put(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Put the factors on the same devices."""
    bases = compat.bind(eqn, [deferred.now(getattr(value, "base", value)) for value in values])
    moved = []
    for value, base, device in zip(values, bases, eqn.params["devices"], strict=True):
        if not isinstance(value, LowRank):
            moved.append(base)
        elif device is None or isinstance(device, NamedSharding):
            moved.append(_placed(value, base, device, jax.device_put))
        else:
            moved.append(jax.tree.map(lambda x, to=device: jax.device_put(x, to), value))
    return moved


@rule("pvary")
def vary(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Let the factors vary over the mesh as the base does."""
    return [jax.tree.map(lambda x: compat.bind(eqn, [x])[0], weight)]


@rule("ppermute")
def permute(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Send each factor where the base goes, but for one that is the same everywhere."""
    mesh_axes = set(eqn.params["axis_name"])
    is_known = mesh_axes & compat.varying(weight.base)  # else nothing says what varies

    def send(x):
        is_same = is_known and not mesh_axes & compat.varying(x)
        return x if is_same else compat.bind(eqn, [x])[0]

    return [jax.tree.map(send, weight)]


@rule("all_gather")
def all_gather(run: Evaluation, eqn: Any, weight: LowRank) -> list[Any]:
    """Gather the shards of the factors along an axis."""
    params = eqn.params
    dim = params["all_gather_dimension"]
    if not params["tiled"] or len(weight.dims[dim]) != 1:
        return run.without_rule(eqn, [weight], "it gathers along what is not one axis")
    base = deferred.bind(eqn, [weight.base])

    def gather(x, axis):
        groups = params["axis_index_groups"]
        return lax.all_gather(
            x, params["axis_name"], axis=axis, tiled=True, axis_index_groups=groups
        )

    return [weight.along(dim, gather, base=base)]


@rule("shard_map", passes=True)
def shard_map(run: Evaluation, eqn: Any, *values: Any) -> list[Any]:
    """Map the evaluation of the inner program over the shards; a shard of a weight is a weight."""
    params = eqn.params
    entered = [
        _Sharded.of(run, eqn, value, NamedSharding(params["mesh"], spec))
        for value, spec in zip(values, params["in_specs"], strict=True)
    ]
    out_shardings = [NamedSharding(params["mesh"], spec) for spec in params["out_specs"]]
    left: list[Any] = []

    def body(*parts):
        shards = [value.shard(part) for value, part in zip(entered, parts, strict=True)]
        outs = [*map(run.evaluator.left, run.inner(eqn, params["jaxpr"], *shards))]
        left[:] = [_Sharded.left(*pair) for pair in zip(outs, out_shardings, strict=True)]
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

    weight: LowRank | None
    parts: dict[str, Any]
    specs: dict[str, Any]
    sharding: NamedSharding

    @classmethod
    def of(cls, run: Evaluation, eqn: Any, value: Any, sharding: NamedSharding) -> "_Sharded":
        """Return a value that enters, dense where its factors cannot be sharded along."""
        base, spec = getattr(value, "base", value), sharding.spec
        if isinstance(base, Deferred) and (spec := _specs_of_parts(base, sharding)) is None:
            base, spec = deferred.now(base), sharding.spec
        if isinstance(value, LowRank):
            value, specs = value.replace(base=base), _specs(value, sharding)
            if specs is not None:
                return cls(value, _arrays(value), specs | {"base": spec}, sharding)
            base = run.densify(eqn, value, "a shard cuts one of several axes of a dimension")
            spec = sharding.spec
        return cls(None, {"base": base}, {"base": spec}, sharding)

    @classmethod
    def left(cls, value: Any, sharding: NamedSharding) -> "_Sharded":
        """Return a value that leaves, with the dimensions of the whole, and made if deferred."""
        if isinstance(value, LowRank):
            value = value.replace(base=deferred.now(value.base))
        value = deferred.now(value)
        if not isinstance(value, LowRank):
            return cls(None, {"base": value}, {"base": sharding.spec}, sharding)
        entries = [*sharding.spec, *[None] * len(value.dims)]
        opened = tuple(
            ((Role.STACK, 1),) if not dim and placement.shards(sharding, entry) > 1 else dim
            for dim, entry in zip(value.dims, entries, strict=False)
        )
        value = value.reshaped(value.base, opened)  # a shard of one entry was a stack's
        whole = value.replace(dims=_resized(value.dims, sharding, _times))
        specs = _specs(whole, sharding) or {}
        return cls(whole, _arrays(value), specs, sharding)

    def placed(self) -> dict[str, Any]:
        """Return the arrays where they have to be on a mesh with Explicit axes."""
        mesh = self.sharding.mesh
        if not mesh.explicit_axes:
            return self.parts
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs)
        return jax.tree.map(jax.sharding.reshard, self.parts, shardings)

    def shard(self, parts: dict[str, Any]) -> Any:
        """Return one shard."""
        if self.weight is None:
            return parts["base"]
        dims = _resized(self.weight.dims, self.sharding, _over)
        if not self.weight.is_probe:
            dims = tuple(tuple(piece for piece in dim if piece[1] != 1) for dim in dims)
        return self.weight.replace(**parts).reshaped(parts["base"], dims)

    def whole(self, parts: dict[str, Any]) -> Any:
        """Return the value outside."""
        return parts["base"] if self.weight is None else self.weight.replace(**parts)


def _arrays(weight: LowRank) -> dict[str, Any]:
    parts = {name: getattr(weight, name) for name in ("base", *CARRIES)}
    return {name: part for name, part in parts.items() if part is not None}


def _specs(weight: LowRank, sharding: NamedSharding) -> dict[str, Any] | None:
    """Return where each array of a weight goes, or None where a dimension is cut unevenly."""
    specs: dict[str, Any] = {"base": sharding.spec}
    for name in _arrays(weight).keys() & CARRIES.keys():
        spec = placement.spec_of(weight.dims, sharding, CARRIES[name].__contains__)
        if spec is None:
            return None
        specs[name] = PartitionSpec(*spec[: getattr(weight, name).ndim])
    return specs


def _resized(dims: axes.Dims, sharding: NamedSharding, resize: Any) -> axes.Dims:
    """Return dimensions of which the first piece is that of a shard, or of the whole."""
    entries = [*sharding.spec, *[None] * (len(dims) - len(sharding.spec))]
    counts = [placement.shards(sharding, entry) for entry in entries]
    return tuple(
        ((dim[0][0], resize(dim[0][1], count)), *dim[1:]) if dim else dim
        for dim, count in zip(dims, counts, strict=True)
    )


_over, _times = operator.floordiv, operator.mul
