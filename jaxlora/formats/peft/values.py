"""What a PEFT folder has in the place of leaves: whole modules, biases, rows of embeddings."""

import collections
from collections.abc import Container, Iterator

import jax.numpy as jnp
import numpy as np

from jaxlora.formats import layouts, pieces
from jaxlora.formats.names import Place
from jaxlora.formats.peft.config import named
from jaxlora.formats.peft.folder import Folder
from jaxlora.formats.peft.keys import Key
from jaxlora.messages import checks
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
    entries: dict[str, list[Entry]] = collections.defaultdict(list)
    for key in keys:
        owner, _, last = key.module.rpartition(".")
        if last == "weight" and key.is_of_base and owner in adapted:
            checks.warn(
                f"{folder.where} has also the weight that {owner!r} adapts, as {key.name!r}: it is "
                "not loaded, and the base must have it",
                UserWarning,
            )
            continue
        is_bias = last == "bias" and folder.config.get("bias", "none") != "none"
        if not is_bias and not folder.config.is_saved(owner):
            raise ValueError(
                f"the tensor {key.name!r} of {folder.where} is not understood: its config names it "
                "in no target, no module to save and no bias"
            )
        is_of_module = last == "weight" and key.module not in folder.table
        place = folder.place(owner if is_of_module else key.module, key)
        entries[place.path].append((place, key, _value(folder, key, place)))
    for path, found in entries.items():
        yield path, _replacement(folder, path, found)


def _value(folder: Folder, key: Key, place: Place) -> np.ndarray:
    """Return what a tensor is in its place."""
    _, shape = folder.box(place)
    if (roles := folder.roles(place)) is None:
        return folder.flat(key, place, shape)
    needed = layouts.weight_shape(roles, shape, place.layout)
    return layouts.weight(folder.tensor(key, place, needed), roles, shape, place.layout)


def _replacement(folder: Folder, path: str, entries: list[Entry]) -> Replacement:
    """Return what replaces a leaf, all of it or entries along its first axis."""
    shape = folder.whole(entries[0][0])
    if len(entries) == 1 and entries[0][0].part is None:
        return Replacement(jnp.asarray(entries[0][2]), shape)
    rows: dict[int, np.ndarray] = {}
    for place, key, value in entries:
        (start, stop), *rest = pieces.box(place.part, shape)
        if stop - start != 1 or rest != [*pieces.box(None, shape)[1:]]:
            raise ValueError(
                f"{key.name!r} of {folder.where} replaces a part of {path!r}, which must be an "
                f"entry along its first axis: got {str(place)!r}"
            )
        rows[start] = value
    value = jnp.asarray(np.concatenate([rows[row] for row in sorted(rows)]))
    return Replacement(value, shape, rows=None if len(rows) == shape[0] else (*sorted(rows),))


def read_tokens(folder: Folder, keys: list[Key]) -> Iterator[tuple[str, Replacement]]:
    """Return the rows of embeddings that were trained, by path."""
    indices = folder.config.get("trainable_token_indices", {})
    for key in keys:
        place = folder.place(key.module, key)
        of_names = indices if isinstance(indices, dict) else {key.module: indices}
        rows = next((rows for name, rows in of_names.items() if named(key.module, [name])), None)
        if rows is None or place.part is not None:
            raise ValueError(
                f"{key.name!r} of {folder.where} must be rows of a whole leaf that "
                f"trainable_token_indices of the config tell: got {indices} and {str(place)!r}"
            )
        shape = folder.whole(place)
        value = folder.tensor(key, place, (len(rows), *shape[1:]))
        order = np.argsort(rows)
        yield (
            place.path,
            Replacement(jnp.asarray(value[order]), shape, rows=tuple(rows[i] for i in order)),
        )
