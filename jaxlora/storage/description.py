"""What a checkpoint of adapters says of itself, beside the factors: all that is static of them.

It is JSON in the metadata of the checkpoint. A checksum over it is part of it, because alpha or
the roles of axes mean other weights when they change, and one over each factor. A description of
format 1 has no checksum of itself, so each field is checked too.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.storage import checkpoints
from jaxlora.types import Json
from jaxlora.version import __version__
from jaxlora.weights import blocks, fingerprints, paths, sharding
from jaxlora.weights.adapters import Adapter, Adapters, Replacement
from jaxlora.weights.roles import Roles

VERSION = 2


def describe(adapters: Adapters) -> Json:
    """Return the description of adapters, as JSON has it."""
    arrays = {name: adapter.trained() for name, adapter in adapters.items()}
    about = {
        "format": checkpoints.ADAPTERS,
        "format_version": VERSION,
        "jaxlora": __version__,
        "targets": list(adapters),
        "adapters": [_entry(name, adapter, arrays[name]) for name, adapter in adapters.items()],
        "checksums": fingerprints.checksums(arrays),
    }
    return about | {"checksum": _checksum(about)}


def _entry(name: str, adapter: Adapter | Replacement, arrays: Json) -> Json:
    base = {
        "shape": [int(size) for size in adapter.shape],
        "dtype": adapter.fingerprint.dtype,
        "digest": adapter.fingerprint.digest,
    }
    dtypes = {field: str(array.dtype) for field, array in arrays.items()}
    return {"path": name, "base": base, "dtypes": dtypes, **adapter.describe()}


def _checksum(about: Json) -> str:
    """Return a hash of all of a description but its ``checksum``, the same in every format."""
    rest = {key: value for key, value in about.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def checked(about: Json) -> Json:
    """Return a description that is whole, in the form of the present format.

    Args:
        about: what was read, of this format or an earlier one.

    Raises:
        ValueError: it is not as it was written; the message says what is wrong with it.
    """
    if "checksum" in about or about.get("format_version") != 1:
        if about.get("checksum") != _checksum(about):
            raise ValueError("its description does not have the checksum that it was written with")
        entries = about["adapters"]
    else:
        entries = [_from_format_1(entry) for entry in _list(about, "adapters", dict)]
    for entry in entries:
        _check(entry)
    names = [entry["path"] for entry in entries]
    if about.get("targets") != names or len(set(names)) < len(names):
        raise ValueError(f"targets must be the paths of adapters, each once: got {names}")
    sums = _value(about, "checksums", dict)
    for entry in entries:
        found = _value(sums, entry["path"], dict)
        for field in entry["dtypes"]:
            _value(found, field, int, f" of {entry['path']!r}")
    return about | {"adapters": entries}


def abstract(entry: Json, leaves: Json) -> Adapter | Replacement:
    """Return the adapter that was described: shapes, sharded as their axes of its leaf.

    Args:
        entry: the description of one adapter, from `checked`.
        leaves: the leaves of the base by path.

    Raises:
        ValueError: its path names no part of a weight of its shape.
    """
    path, text = blocks.locate(entry["path"], leaves)
    known = sharding.concrete(paths.plain(leaves.get(path)))
    whole = tuple(entry["base"]["shape"])
    known_base = fingerprints.read(entry["base"]["dtype"], entry["base"]["digest"])

    def array(field, shape, axes):
        if field not in entry["dtypes"]:
            return None
        place = sharding.along(known, axes) if known else sharding.default()
        return jax.ShapeDtypeStruct(shape, jnp.dtype(entry["dtypes"][field]), sharding=place)

    block = blocks.resolve(text, whole)
    adapter = _kind(entry).from_description(entry, whole, block, array)
    return dataclasses.replace(adapter, fingerprint=known_base)


def leaves(about: Json) -> Json:
    """Return stand-ins for leaves of the base, as far as names of adapters are paths of whole ones.

    Others are parts of a leaf, as `jaxlora.weights.blocks.locate` takes them.
    """
    names = [entry["path"] for entry in about["adapters"]]
    return {name: None for name in names if not blocks.is_part(name)}


def _kind(entry: Json) -> type[Adapter | Replacement]:
    """Return the type of what an entry describes."""
    return Adapter if "roles" in entry else Replacement


def _from_format_1(entry: Json) -> Json:
    """Return the description of one adapter of format 1 as format 2 has it."""
    names = _kind(entry).fields
    dtypes = _list(entry, "dtypes", str)[: len(names)]
    entry = entry | {"dtypes": dict(zip(names, dtypes, strict=False))}
    if "roles" not in entry:
        return entry
    roles = _value(entry, "roles", dict)
    roles = {"in" if key == "in_" else key: axes for key, axes in roles.items()}
    return {"changed": ""} | entry | {"roles": roles}


def _check(entry: Json) -> None:
    """Raise if a field of the description of one adapter is missing or cannot be."""
    where = f" of {_value(entry, 'path', str)!r}"
    base = _value(entry, "base", dict, where)
    shape = _list(base, "shape", int, where)
    _value(base, "dtype", (str, type(None)), where)
    _value(base, "digest", (str, type(None)), where)
    is_adapter = "roles" in entry
    dtypes = _value(entry, "dtypes", dict, where)
    wanted = {"a", "b"} if is_adapter else {"value"}
    if not wanted <= set(dtypes) <= wanted | ({"magnitude"} if is_adapter else set()):
        raise ValueError(f"dtypes{where} must be those of its factors: got {dtypes}")
    for dtype in dtypes.values():
        if not isinstance(dtype, str) or not _is_dtype(dtype):
            raise ValueError(f"dtypes{where} must be names of dtypes: got {dtype!r}")
    if not is_adapter:
        rows = _list(entry, "rows", int, where) if entry.get("rows", "") is not None else []
        if not all(0 <= row < (shape or [0])[0] for row in rows):
            raise ValueError(f"rows{where} must be of a leaf of shape {shape}: got {rows}")
        return
    if (rank := _value(entry, "rank", int, where)) < 1:
        raise ValueError(f"rank{where} must be at least 1: got {rank}")
    alpha = _value(entry, "alpha", (int, float), where)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha{where} must be finite and positive: got {alpha}")
    _value(entry, "changed", str, where)
    if len(_axes(entry)) != len(shape):
        raise ValueError(f"roles{where} must name each axis of {shape}: got {entry['roles']}")


def _axes(entry: Json) -> list[int]:
    """Return the axes that the roles of an entry name, or raise if they cannot be roles."""
    found = _value(entry, "roles", dict)
    groups = [_list(found, name, int) for name in ("stack", "in", "out")]
    Roles(*map(tuple, groups))
    return [axis for group in groups for axis in group]


def _is_dtype(name: str) -> bool:
    try:
        jnp.dtype(name)
    except TypeError:
        return False
    return True


def _value(holder: Json, key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """Return a field of a description, or raise if it is missing or of another type."""
    if not isinstance(holder, dict) or key not in holder:
        raise ValueError(f"it has no {key!r}{where}")
    found = holder[key]
    if isinstance(found, bool) or not isinstance(found, kind):
        raise ValueError(f"{key!r}{where} cannot be {found!r}")
    return found


def _list(holder: Json, key: str, kind: type | tuple[type, ...], where: str = "") -> list[Any]:
    found = _value(holder, key, list, where)
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in found):
        raise ValueError(f"{key!r}{where} cannot be {found!r}")
    return found
