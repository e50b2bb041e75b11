"""Adapters merged into a checkpoint of Hugging Face, one tensor after the other."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.formats import arguments
from jaxlora.formats.names.mapping import Names, missing
from jaxlora.formats.safetensors import shards
from jaxlora.formats.safetensors.entries import Entry
from jaxlora.formats.safetensors.rows import Weight
from jaxlora.formats.safetensors.shards import Checkpoint
from jaxlora.formats.streaming import Rows
from jaxlora.storage import replacing
from jaxlora.targets.sites import Sites
from jaxlora.trees.binding import nodes_over
from jaxlora.weights.adapters import Adapters


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Adapters,
    path: str | os.PathLike[str],
    *,
    names: Names,
    sites: Sites,
    max_shard_bytes: int = 5 * 10**9,
    at_each: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the weights of a checkpoint with adapters merged into them.

    One tensor is in memory at a time, beside rows of it that are merged and written. Each that is
    adapted is summed in float32 and rounded once; the others are copied. The folder is there whole,
    or what was there before is as it was.

    Args:
        base: the checkpoint, as `jaxlora.formats.safetensors.load` takes it.
        adapters: adapters by path, each of one whole tensor.
        path: a folder that is not there, is empty, or holds nothing but an earlier save.
        names: the name of each path, see `jaxlora.formats.peft.load`.
        sites: where the adapters go.
        max_shard_bytes: as of `jaxlora.formats.safetensors.save`.
        at_each: called with the number of tensors when one is begun.

    Raises:
        FileExistsError: the folder holds something else.
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: a file is damaged; an adapter has no tensor, or one of another shape; a merged
            weight is not finite.
        OSError: it cannot be written.
    """
    target = arguments.local(path)
    with shards.opened(arguments.standing(base)) as found:
        entries = _entries(found, adapters, names, sites)
        shapes = {
            name: jax.ShapeDtypeStruct(shape, found.dtype(name))
            for name, shape in found.shapes.items()
        }

        def make(name: str) -> Iterable[Rows]:
            at_each(len(shapes))
            tensor = found[name]
            if name not in entries:
                return [lambda: tensor]
            return _merged_rows(name, tensor, entries[name], adapters)

        def write(folder: Path) -> None:
            folder.mkdir()
            shards.write(folder, shapes, make, max_shard_bytes)

        replacing.replace_from_first(
            "merge_checkpoint",
            target,
            write,
            lambda place: replacing.check_free(place, target, shards.is_of_checkpoint),
        )


def _entries(found: Checkpoint, adapters: Adapters, names: Names, sites: Sites) -> dict[str, Entry]:
    """Return what each tensor is that an adapter is for, by its name."""
    table = names.table({path: sites.shapes[path] for path in adapters})
    entries = {}
    for module, place in table.items():
        name = module if module in found.shapes else f"{module}.weight"
        if name not in found.shapes:
            raise ValueError(
                f"{found.where} has no tensor for the adapter of {module!r}: "
                f"{missing(name, found.shapes)}"
            )
        entry = Entry.from_place(place, sites.shapes[place.path], sites)
        if found.shapes[name] != (needed := entry.form.tensor_shape):
            raise ValueError(
                f"the tensor {name!r} of {found.where} must have the shape {needed} for the "
                f"adapter of {module!r}: got {found.shapes[name]}"
            )
        dtype = found.dtype(name)
        is_floating = jnp.issubdtype(dtype, jnp.floating)
        if not is_floating or jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"the tensor {name!r} of {found.where} must be floating to be merged into, and of "
                f"64 bits only with jax_enable_x64: got {dtype}"
            )
        entries[name] = entry
    return entries


def _merged_rows(name: str, tensor: np.ndarray, entry: Entry, adapters: Adapters) -> Iterator[Rows]:
    path = entry.place.path
    leaf = jnp.asarray(entry.from_tensor(tensor))
    nodes = nodes_over({path: leaf}, {path: adapters[path]}, check_base=False)
    return Weight(name, nodes[path]).rows(entry)
