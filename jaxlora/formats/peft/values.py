"""What a PEFT folder has in the place of leaves: whole modules, biases, rows of embeddings."""

import collections
from collections.abc import Container, Iterator

import numpy as np

from jaxlora.formats import pieces
from jaxlora.formats.layouts import check_untied
from jaxlora.formats.names.mapping import Place
from jaxlora.formats.peft.config import named
from jaxlora.formats.peft.folder import Folder
from jaxlora.formats.peft.keys import Key
from jaxlora.messages import checks
from jaxlora.weights import blocks
from jaxlora.weights.adapters import Replacement

Entry = tuple[Place, Key, np.ndarray]


def read(
    folder: Folder, keys: list[Key], adapted: Container[str]
) -> Iterator[tuple[str, Replacement]]:
    """Return what replaces leaves, by path: modules that were saved whole, and biases.

    Args:
        folder: the folder.
        keys: the tensors that have values.
        adapted: the names of the modules that have factors.
    """
    entries: dict[str, dict[Place, Entry]] = collections.defaultdict(dict)
    found: set[str] = set()
    for key in keys:
        owner, _, last = key.module.rpartition(".")
        if _is_of_base(folder, key, adapted):
            continue
        is_bias = last == "bias" and folder.config.get("bias", "none") != "none"
        if not is_bias and not folder.config.saved(owner):
            raise ValueError(
                f"the tensor {key.name!r} of {folder.where} is not understood: its config names it "
                "in no target, no module to save and no bias"
            )
        name = owner if last == "weight" and key.module not in folder.table else key.module
        place = folder.place(name, key.name)
        if not is_bias:
            check_untied(folder.sites, place, folder.where)
        found.add(name)
        value = _value(folder, key, place)
        _, known, other = entries[place.path].setdefault(place, (place, key, value))
        if known is not key and not np.array_equal(value, other, equal_nan=True):
            raise ValueError(
                f"the tensors {known.name!r} and {key.name!r} of {folder.where} are of one place, "
                f"{str(place)!r}, and must be equal: got different values"
            )
    _check_all(folder, found, adapted)
    for path, own in entries.items():
        yield path, _replacement(folder, path, [*own.values()])


def _is_of_base(folder: Folder, key: Key, adapted: Container[str]) -> bool:
    """Tell whether a tensor is the base's own, which stays there; warn if it is a weight."""
    owner, _, last = key.module.rpartition(".")
    if "original_module" in key.name.split("."):
        return True
    if last != "weight" or not key.is_of_base or owner not in adapted:
        return False
    checks.warn(
        f"{folder.where} has also the weight that {owner!r} adapts, as {key.name!r}: it is not "
        "loaded, and the base must have it",
        UserWarning,
    )
    return True


def _check_all(folder: Folder, found: Container[str], adapted: Container[str]) -> None:
    """Raise if the config promises a module or a bias for which there is no tensor."""
    config, bias = folder.config, folder.config.get("bias", "none")
    met, missing = set[str](), []
    for name in folder.table:
        owner, _, last = name.rpartition(".")
        saved = config.saved(owner if last in ("weight", "bias") else name)
        met |= saved
        is_bias = last == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted))
        if (saved or is_bias) and name not in found:
            missing.append(name)
    if missing := [*missing, *sorted({*config.get("modules_to_save", ())} - met)]:
        raise ValueError(
            f"{folder.where} has no tensors of what its config saves: "
            f"{', '.join(map(repr, missing[:5]))}"
        )


def _value(folder: Folder, key: Key, place: Place) -> np.ndarray:
    """Return what a tensor is in its place."""
    _, shape = folder.box(place)
    if (found := folder.arrangement(place)) is None:
        return folder.flat(key.name, place, shape)
    return found.weight(folder.tensor(key.name, place, found.weight_shape(shape)), shape)


def _replacement(folder: Folder, path: str, entries: list[Entry]) -> Replacement:
    """Return what replaces a leaf, all of it or entries along its first axis."""
    shape, first = folder.whole(entries[0][0]), entries[0][2]
    value, count = np.empty(shape, first.dtype), 0
    for place, _, part in entries:
        value[blocks.slices(place.part)] = part
        count += part.size
    if count == value.size:
        return Replacement(value, shape)
    rows = []
    for place, key, _ in entries:
        (start, stop), *rest = pieces.box(place.part, shape)
        if stop - start != 1 or rest != [*pieces.box(None, shape)[1:]]:
            raise ValueError(
                f"{key.name!r} of {folder.where} replaces a part of {path!r}, which must be an "
                f"entry along its first axis: got {str(place)!r}"
            )
        rows.append(start)
    return Replacement(value[sorted(rows)], shape, rows=tuple(sorted(rows)))


def read_tokens(folder: Folder, keys: list[Key]) -> Iterator[tuple[str, Replacement]]:
    """Return the rows of embeddings that were trained, by path."""
    told = folder.config.get("trainable_token_indices", {})
    of_names = told if isinstance(told, dict) else {key.module: told for key in keys}
    for name in of_names:
        if not any(named(key.module, [name]) for key in keys):
            raise ValueError(f"{folder.where} has no rows of {name!r}, which its config names")
    for key in keys:
        place = folder.place(key.module, key.name)
        rows = next((rows for name, rows in of_names.items() if named(key.module, [name])), None)
        if rows is None or place.part is not None or place.layout != "embedding":
            raise ValueError(
                f"{key.name!r} of {folder.where} must be rows of a whole leaf of the layout "
                f"'embedding' that trainable_token_indices of the config tell: got {told} and "
                f"{str(place)!r} of the layout {place.layout!r}"
            )
        shape = folder.whole(place)
        if len({*rows}) != len(rows) or max(rows, default=0) >= shape[0]:
            raise ValueError(
                f"trainable_token_indices of {folder.where} must be different and below "
                f"{shape[0]}, the rows of {place.path!r}: got {rows}"
            )
        value = folder.tensor(key.name, place, (len(rows), *shape[1:]))
        order = np.argsort(rows)
        yield (
            place.path,
            Replacement(value[order], shape, rows=tuple(rows[i] for i in order)),
        )
