"""Save and load the factors alone.

A save is written beside its destination, read again, and only then takes its place (see
`jaxlora.storage.checkpoints`); so one that fails or is killed leaves the earlier one. Adapters
carry what is needed to refuse another base and damaged files (see `jaxlora.storage.description`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxlora.messages import checks
from jaxlora.storage import checkpoints, description, directories, locations, processes, replacing
from jaxlora.storage.locations import PathLike, Place
from jaxlora.storage.processes import together
from jaxlora.trees.binding import bind, changed_hint, split
from jaxlora.types import Json, Leaf, Leaves, PyTree
from jaxlora.weights import blocks, fingerprints, modules, paths, tree_checks
from jaxlora.weights.adapters import Adapter, Adapters, Replacement

T = TypeVar("T")


def save_adapters(path: PathLike, adapters: Adapters, *, base: PyTree = None) -> None:
    """Write the factors, and what is needed to know them again, to a directory.

    Rank, alpha, roles, shape, dtype and content hash of the base weight are written for each
    adapter, and the version of this library. An earlier save of adapters there is replaced, and
    only when the new one is whole: it has been read again and compared. Programs may save to one
    path at the same time, and others load from it: the last save stays.

    In a bucket (``gs://``) Orbax writes in place, and marks as whole what is. It can replace a
    checkpoint there only by deleting it first, so nothing is replaced: each save needs a path of
    its own.

    Args:
        path: a directory, which may hold an earlier save of adapters and nothing else; ``~`` is
            the home directory, a symbolic link stands for what it points to, and ``gs://`` is a
            bucket of Google Cloud Storage, for which gcsfs is needed.
        adapters: factors by path, from `jaxlora.split` outside of `jax.jit` (inside, the values of
            the base are unknown, and so only its shape and dtype can be checked at loading, of
            which a warning tells).
        base: the tree of plain parameters that the adapters are for; what it holds is written in
            the place of what `jaxlora.split` saw.

    Raises:
        ValueError: adapters is empty, does not fit the base, or a factor is not finite.
        TypeError: a value is no `Adapter`, a name is no string, or it is called in `jax.jit`.
        FileExistsError: the path holds something else than adapters that were saved.
        OSError: it cannot be written; what was saved there before is as it was.
    """
    modules.refuse_adapted("adapters", adapters, "save adapted.adapters()")
    tree_checks.check_adapters(adapters, some=True)
    tree_checks.check_untraced("save_adapters", adapters)
    if base is not None:
        adapters = split(bind(base, adapters, check_base=False))[1]
    arrays = _arrays(adapters)
    together("save_adapters", lambda: _check_finite(arrays))
    _warn_of_unknown_bases(adapters)
    about = description.describe(adapters)
    try:
        description.checked(json.loads(json.dumps(about)))
    except ValueError as error:
        raise ValueError(f"the adapters cannot be saved: {error}") from error

    def check(place):
        like = jax.tree.map(checkpoints.like, arrays)
        restored = together("save_adapters", lambda: checkpoints.read(place, like))
        together("save_adapters", lambda: _check_written(restored, about))

    checkpoints.write("save_adapters", path, arrays, about, check)


def load_adapters(path: PathLike, *, base: PyTree) -> Adapters:
    """Read the factors from a directory, for a base that they fit.

    Nothing is written, so the directory may be read-only. Where a save replaces it meanwhile,
    what was there before or after is returned, never a part of each.

    Args:
        path: a directory written by `save_adapters`, or a path as that takes it.
        base: the tree of plain parameters, as from `jaxlora.split`, that they were made for.

    Returns:
        Adapters by path, bit-equal to those saved, sharded as the axes of the base that they
        carry; it does not matter how they were sharded when they were saved.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no adapters, or damaged ones, or adapters for another base.
        TypeError: base is no tree of weights, or it is called in `jax.jit`.
    """
    tree_checks.check_untraced("load_adapters", base)
    leaves = tree_checks.check_tree(base, "load_adapters(path, base=base)", "base")
    return _settled(path, lambda place, target: _load(place, target, leaves))


def load_unbound(path: PathLike) -> Adapters:
    """Read the factors from a directory without their base, for what needs the products alone.

    They are damaged or as they were saved, as for `load_adapters`. What they know of the base is
    what was written of it, so `jaxlora.bind` refuses another.

    Args:
        path: a directory written by `save_adapters`, or a path as that takes it.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no adapters, or damaged ones.
    """
    return _settled(path, lambda place, target: _load(place, target, None))


def describe_saved(path: PathLike) -> Json:
    """Return what a directory of adapters says of itself, see `jaxlora.storage.description`.

    Args:
        path: a directory written by `save_adapters`, or a path as that takes it.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it holds no adapters, or a damaged description.
    """
    return _settled(
        path, lambda place, target: _description(checkpoints.about_of(place, target), target)
    )


def _settled(path: PathLike, read: Callable[[Place, Place], T]) -> T:
    """Return what a function reads, given where the directory is and where it should be."""
    target = together("load_adapters", lambda: locations.resolve(path))
    if not locations.is_local(target):
        return read(target, target)
    return directories.settled(
        target,
        lambda place: read(place, target),
        agree=lambda flag: "1" in processes.gathered("load_adapters", str(int(flag))),
    )


def _arrays(adapters: Adapters) -> dict[str, Leaves]:
    """Return what is trained, by path and name."""
    return {path: adapter.trained() for path, adapter in adapters.items()}


def _check_written(restored: dict[str, Leaves], about: Json) -> None:
    """Raise if what was read again is not what was to be written."""
    if fingerprints.checksums(restored) != about["checksums"]:
        raise ValueError(checkpoints.NOT_WRITTEN)


def _check_finite(arrays: dict[str, Leaves]) -> None:
    """Raise if a factor holds NaN or inf."""
    finite = jax.device_get(jax.tree.map(_is_finite, arrays))
    for name, fields in finite.items():
        if bad := [field for field, is_finite in fields.items() if not is_finite]:
            raise ValueError(
                f"the adapter of {name!r} must be finite to be saved: {' and '.join(bad)} "
                "hold NaN or inf"
            )


def _warn_of_unknown_bases(adapters: Adapters) -> None:
    """Warn of adapters of which it is not known what base they are for."""
    if unknown := [name for name, a in adapters.items() if a.fingerprint.digest is None]:
        checks.warn(
            f"the values of the base of {unknown[0]!r} are unknown, or of one of several bases "
            f"({len(unknown)} of {len(adapters)} adapters): another base cannot be refused when "
            "they are loaded; pass base= to save_adapters",
            UserWarning,
        )


@jax.jit
def _is_finite(array: Leaf) -> jax.Array:
    return jnp.isfinite(array).all()


def _load(place: Place, target: Place, leaves: Leaves | None) -> Adapters:
    """Return the adapters in a directory, for leaves of a base; errors name where it should be."""
    call = "load_adapters"
    about = together(call, lambda: _description(checkpoints.about_of(place, target), target))
    said = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    if len(set(processes.gathered(call, said))) > 1:  # it is replaced just now, or not shared
        raise ValueError(f"the processes of the program do not read the same adapters at {target}")
    try:
        known = leaves if leaves is not None else description.leaves(about)
        adapters = {e["path"]: description.abstract(e, known) for e in about["adapters"]}
    except ValueError as error:
        raise ValueError(f"the adapters at {target} are damaged: {error}") from error

    def check():
        _check_width(adapters, target)
        if leaves is not None and (problems := _differences(adapters, leaves)):
            more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
            listed = "\n  ".join([*problems[:5], *more])
            raise ValueError(f"the adapters at {target} are for another base:\n  {listed}")

    def read():
        try:
            return checkpoints.read(place, _arrays(adapters))
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            if number := replacing.os_number(error):
                text = f"cannot read the adapters at {target}: {os.strerror(number)}"
                raise OSError(number, text) from error
            raise ValueError(f"the adapters at {target} are damaged: {error}") from error

    def verify():
        sums = fingerprints.checksums(arrays)
        if bad := [name for name in sums if sums[name] != about["checksums"][name]]:
            raise ValueError(
                f"the adapters at {target} are damaged: {bad} are not as they were saved"
            )

    together(call, check)
    arrays = together(call, read)
    together(call, verify)
    if leaves is not None:
        adapters = {name: _known_by(name, found, leaves) for name, found in adapters.items()}
    return {name: dataclasses.replace(found, **arrays[name]) for name, found in adapters.items()}


def _check_width(adapters: Adapters, target: Place) -> None:
    """Raise if factors are of 64 bits, and JAX has none now."""
    for name, fields in _arrays(adapters).items():
        for array in fields.values():
            if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
                raise ValueError(
                    f"the adapter of {name!r} at {target} is {array.dtype}, which needs "
                    "jax_enable_x64"
                )


def _differences(adapters: Adapters, leaves: Leaves) -> list[str]:
    """Return a line for each weight of the base that is not the one an adapter was made for."""
    located = {name: blocks.locate(name, leaves)[0] for name in adapters}
    present = {path: paths.plain(leaves[path]) for path in located.values() if path in leaves}
    lines = []
    for name, adapter in adapters.items():
        wanted, leaf = adapter.fingerprint, present.get(located[name])
        if leaf is None:
            lines.append(f"{name!r} is missing; {paths.nearest(name, leaves)}")
            continue
        if not tree_checks.is_weight(leaf):
            lines.append(
                f"{name!r} must be an array of shape {adapter.shape}: got {checks.shown(leaf)}"
            )
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


def _known_by(name: str, adapter: Adapter | Replacement, leaves: Leaves) -> Adapter | Replacement:
    """Return an adapter with the fingerprint of the base it was loaded for, if that has values."""
    path, text = blocks.locate(name, leaves)
    found = fingerprints.take(paths.plain(leaves[path]), blocks.resolve(text, adapter.shape))
    return adapter if found.digest is None else dataclasses.replace(adapter, fingerprint=found)


def _description(about: Json, target: Place) -> Json:
    """Return the description of adapters in the form of the present format, or raise."""
    if about.get("format") != checkpoints.ADAPTERS and "checksum" not in about:
        raise ValueError(f"no adapters at {target}: it is a checkpoint of something else")
    version = about.get("format_version")
    if isinstance(version, int) and version > description.VERSION:
        raise ValueError(
            f"the adapters at {target} are damaged, or have format {version}, written by jaxlora "
            f"{about.get('jaxlora')}: this version reads up to format {description.VERSION}"
        )
    try:
        return description.checked(about)
    except ValueError as error:
        raise ValueError(f"the adapters at {target} are damaged: {error}") from error
