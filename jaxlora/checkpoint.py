"""Save and load with Orbax: the factors alone, or merged weights as plain Orbax reads them.

A save is written beside its destination and then takes its place by renaming, so a save that is
interrupted at any point leaves the earlier one: at its path, or beside it, where the next load
or save finds it. Adapters carry what is needed to refuse another base and damaged files.

In a program of several processes each of them calls every function here, with one path on a file
system that they share. Each writes and reads its own part of the arrays, the first alone renames
and removes, and what goes wrong in one is raised in all.

Orbax is imported where it is used, because that takes half as long as importing JAX.
"""

import dataclasses
import json
import os
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import fingerprints, parts, paths, sharding
from jaxlora.merging import merge
from jaxlora.processes import together
from jaxlora.trees import FACTORS, Adapters, bind, changed_hint, split
from jaxlora.weight import Adapter, Replacement, Roles

FORMAT = "jaxlora.adapters"
FORMAT_VERSION = 1
_ORBAX_MARK = "_CHECKPOINT_METADATA"
PathLike = str | os.PathLike[str]


def save_adapters(path: PathLike, adapters: Adapters, *, base: Any = None) -> None:
    """Write the factors, and what is needed to know them again, to a directory.

    Rank, alpha, roles, shape, dtype and content hash of the base weight are written for each
    adapter, and the version of this library. An earlier save of adapters there is replaced only
    when the new one is whole.

    Args:
        path: a local directory; it may hold an earlier checkpoint, and nothing else.
        adapters: factors by path, from `jaxlora.split` outside of `jax.jit` (inside, the values of
            the base are unknown, and so only its shape and dtype can be checked at loading, of
            which a warning tells).
        base: the tree of plain parameters that the adapters are for; what it holds is written in
            the place of what `jaxlora.split` saw.

    Raises:
        ValueError: adapters is empty, or does not fit the base.
        TypeError: a value is no `Adapter`.
        FileExistsError: the path holds something that is no checkpoint.
    """
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to save")
    for name, adapter in adapters.items():
        if not isinstance(adapter, Adapter | Replacement):
            raise TypeError(f"adapters[{name!r}] must be an Adapter: got {type(adapter).__name__}")
    if base is not None:
        adapters = split(bind(base, adapters, check_base=False))[1]
    if unknown := [name for name, a in adapters.items() if a.fingerprint.digest is None]:
        warnings.warn(
            f"the values of the base of {unknown[0]!r} are unknown, or of one of several bases "
            f"({len(unknown)} of {len(adapters)} adapters): another base cannot be refused when "
            "they are loaded; pass base= to save_adapters",
            stacklevel=2,
        )
    factors = _factors(adapters)
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "jaxlora": metadata.version("jaxlora"),
        "targets": list(adapters),
        "adapters": [_describe(name, adapter) for name, adapter in adapters.items()],
        "checksums": fingerprints.checksums(factors),
    }
    _write(path, factors, about)


def load_adapters(path: PathLike, *, base: Any) -> Adapters:
    """Read the factors from a directory, for a base that they fit.

    Args:
        path: a directory written by `save_adapters`.
        base: the tree of plain parameters, as from `jaxlora.split`, that they were made for.

    Returns:
        Adapters by path, bit-equal to those saved, sharded as the axes of the base that they
        carry; it does not matter how they were sharded when they were saved.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no adapters, or damaged ones, or adapters for another base.
    """
    path = Path(path).absolute()
    together(lambda: _recover(path), first_alone=True)
    about = together(lambda: _about(path))
    leaves, _ = paths.flatten(base)
    adapters = {entry["path"]: _abstract(entry, leaves) for entry in about["adapters"]}
    if problems := _differences(adapters, leaves):
        shown = "\n  ".join(problems[:5] + [f"and {len(problems) - 5} more"] * (len(problems) > 5))
        raise ValueError(f"the adapters at {path} are for another base:\n  {shown}")
    factors = together(lambda: _read(path, _factors(adapters)))
    sums = fingerprints.checksums(factors)
    if bad := [name for name in sums if sums[name] != about["checksums"][name]]:
        raise ValueError(f"the adapters at {path} are damaged: {bad} are not as they were saved")
    return {
        name: dataclasses.replace(_known_by(name, adapter, leaves), **factors[name])
        for name, adapter in adapters.items()
    }


def save_merged(path: PathLike, params: Any) -> None:
    """Merge a tree and write plain weights to a directory that plain Orbax restores.

    ``orbax.checkpoint.StandardCheckpointer().restore(path)`` reads it. An earlier checkpoint there
    is replaced only when the new one is whole.

    Args:
        path: a local directory; it may hold an earlier checkpoint, and nothing else.
        params: a tree with `LoRAWeight` nodes.

    Raises:
        ValueError: no leaf is adapted, or a merged weight is not finite.
        FileExistsError: the path holds something that is no checkpoint.
    """
    about = {"format": "jaxlora.merged", "jaxlora": metadata.version("jaxlora")}
    _write(path, merge(params), about)


def _factors(adapters: Adapters) -> dict[str, dict[str, Any]]:
    """Return what is trained, by path and name."""
    found = {
        name: {field: getattr(adapter, field, None) for field in FACTORS}
        for name, adapter in adapters.items()
    }
    return {
        name: {k: v for k, v in factors.items() if v is not None} for name, factors in found.items()
    }


def _describe(name: str, adapter: Adapter | Replacement) -> dict[str, Any]:
    """Return all that is static of an adapter, for JSON."""
    about = {
        "path": name,
        "base": {
            "shape": adapter.shape,
            "dtype": adapter.fingerprint.dtype,
            "digest": adapter.fingerprint.digest,
        },
        "dtypes": [str(x.dtype) for x in _factors({name: adapter})[name].values()],
    }
    if isinstance(adapter, Replacement):
        return about | {"rows": adapter.rows}
    return about | {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "roles": dataclasses.asdict(adapter.roles),
        "changed": adapter.changed,
    }


def _abstract(entry: dict[str, Any], leaves: dict[str, Any]) -> Adapter | Replacement:
    """Return the adapter that was described: shapes, sharded as their axes of its leaf."""
    path, text = parts.locate(entry["path"], leaves)
    known = sharding.of(paths.plain(leaves.get(path)))
    whole = tuple(entry["base"]["shape"])
    base = (whole, fingerprints.read(entry["base"]["dtype"], entry["base"]["digest"]))
    if "roles" not in entry:
        (dtype,), rows = entry["dtypes"], entry["rows"] and tuple(entry["rows"])
        shape = whole if rows is None else (len(rows), *whole[1:])
        axes = (None if rows else 0, *range(1, len(shape)))[: len(shape)]
        place = sharding.along(known, axes) if known else sharding.default()
        return Replacement(jax.ShapeDtypeStruct(shape, dtype, sharding=place), *base, rows)
    roles = Roles(**{name: tuple(axes) for name, axes in entry["roles"].items()})
    part = parts.resolve(text, whole)
    shapes = (
        *roles.factor_shapes(parts.shape(part, whole), entry["rank"]),
        roles.magnitude_shape(parts.shape(part, whole)),
    )
    a, b, *magnitude = (
        jax.ShapeDtypeStruct(
            shape,
            jnp.dtype(dtype),
            sharding=sharding.along(known, axes) if known else sharding.default(),
        )
        for shape, dtype, axes in zip(  # without a magnitude there are two dtypes
            shapes, entry["dtypes"], sharding.factor_axes(roles, part), strict=False
        )
    )
    return Adapter(a, b, roles, entry["alpha"], *base, entry.get("changed", ""), *magnitude)


def _differences(adapters: Adapters, leaves: dict[str, Any]) -> list[str]:
    """Return a line for each weight of the base that is not the one an adapter was made for."""
    located = {name: parts.locate(name, leaves)[0] for name in adapters}
    present = {path: paths.plain(leaves[path]) for path in located.values() if path in leaves}
    lines = []
    for name, adapter in adapters.items():
        wanted, leaf = adapter.fingerprint, present.get(located[name])
        if leaf is None:
            lines.append(f"{name!r} is missing; {paths.nearest(name, leaves)}")
            continue
        got = fingerprints.take(leaf)
        dtype = wanted.dtype or got.dtype
        if (tuple(leaf.shape), got.dtype) != (adapter.shape, dtype):
            lines.append(
                f"{name!r} must be {dtype}{list(adapter.shape)}: got {got.dtype}{list(leaf.shape)}"
            )
        elif (wrong := wanted.refusal(leaf)) is not None:
            lines.append(f"{name!r} {wrong}{changed_hint(adapter)}")
    return lines


def _known_by(name: str, adapter: Adapter | Replacement, leaves: dict[str, Any]) -> Any:
    """Return an adapter with the fingerprint of the base it was loaded for, if that has values."""
    path, text = parts.locate(name, leaves)
    found = fingerprints.take(paths.plain(leaves[path]), parts.resolve(text, adapter.shape))
    return adapter if found.digest is None else dataclasses.replace(adapter, fingerprint=found)


def _write(path: PathLike, tree: Any, about: dict[str, Any]) -> None:
    """Write a checkpoint beside its destination, then put it in its place."""
    path = Path(path).absolute()
    together(lambda: _make_room(path), first_alone=True)

    def save():
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            args = ocp.args.StandardSave(jax.tree.map(_savable, tree))
            checkpointer.save(_beside(path, "new"), args=args, custom_metadata=about)

    together(save)
    together(lambda: _put_in_place(path), first_alone=True)


def _make_room(path: Path) -> None:
    """Leave nothing beside a destination, or raise if it holds something that is not ours."""
    _recover(path)
    if path.exists() and not (_is_checkpoint(path) or (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path} holds something that is no checkpoint: choose another path")
    for suffix in ("new", "old"):
        shutil.rmtree(_beside(path, suffix), ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)


def _put_in_place(path: Path) -> None:
    old = _beside(path, "old")
    if path.exists():
        path.rename(old)
    _beside(path, "new").rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _savable(array: Any) -> Any:
    """Return an array as Orbax takes it: one that each process has for itself as NumPy's."""
    is_local = isinstance(array, jax.Array) and array.is_fully_addressable
    return np.asarray(array) if is_local and jax.process_count() > 1 else array


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _recover(path: Path) -> None:
    """Put the earlier save back where a save was interrupted between its two renames."""
    old = _beside(path, "old")
    if not path.exists() and _is_checkpoint(old):
        old.rename(path)


def _is_checkpoint(path: Path) -> bool:
    return (path / _ORBAX_MARK).is_file()


def _about(path: Path) -> dict[str, Any]:
    """Return what a save wrote of itself, or raise if there is none or it is none of ours."""
    if not path.exists():
        raise FileNotFoundError(f"no adapters at {path}: there is no such directory")
    if not _is_checkpoint(path):
        raise ValueError(f"no adapters at {path}: it is no Orbax checkpoint, or not a whole one")
    try:
        about = json.loads((path / _ORBAX_MARK).read_text())["custom_metadata"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"the checkpoint at {path} is damaged: {_ORBAX_MARK} is no JSON"
        ) from error
    if (about or {}).get("format") != FORMAT:
        raise ValueError(f"no adapters at {path}: it is a checkpoint of something else")
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"the adapters at {path} have format {about['format_version']}, written by jaxlora "
            f"{about['jaxlora']}: this version reads up to format {FORMAT_VERSION}"
        )
    return about


def _read(path: Path, target: Any) -> Any:
    import orbax.checkpoint as ocp

    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(target))
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise ValueError(f"the adapters at {path} are damaged: {error}") from error
