"""Merged weights in a directory that plain Orbax restores."""

from jaxlora.storage import checkpoints
from jaxlora.storage.locations import PathLike
from jaxlora.storage.processes import together
from jaxlora.trees.merging import merge
from jaxlora.types import PyTree
from jaxlora.version import __version__
from jaxlora.weights import modules, tree_checks


def save_merged(path: PathLike, params: PyTree) -> None:
    """Merge a tree and write plain weights to a directory that plain Orbax restores.

    ``orbax.checkpoint.StandardCheckpointer().restore(path)`` reads it. An earlier save of merged
    weights there is replaced as `save_adapters` replaces adapters.

    Args:
        path: a directory, which may hold an earlier save of merged weights and nothing else, or
            a path as `save_adapters` takes it.
        params: a tree with `LoRAWeight` nodes.

    Raises:
        ValueError: no leaf is adapted, or a merged weight is not finite.
        TypeError: it is called in `jax.jit`.
        FileExistsError: the path holds something else than merged weights that were saved.
        OSError: it cannot be written; what was saved there before is as it was.
    """
    instead = "save adapted.params(), or with Orbax what jaxlora.nnx.merge(adapted) returns"
    modules.refuse_adapted("params", params, instead)
    tree_checks.check_untraced("save_merged", params)
    write("save_merged", path, merge(params))


def write(call: str, path: PathLike, plain: PyTree) -> None:
    """Write plain weights as `save_merged` does.

    Args:
        call: name of the public function, for errors.
        path: a directory, as `save_merged` takes it.
        plain: a tree of arrays.
    """
    about = {"format": checkpoints.MERGED, "jaxlora": __version__}
    wanted = checkpoints.shapes_of(plain)

    def check(place):
        found = together(call, lambda: checkpoints.shapes(place))
        fits = all(wanted[keys] in (None, found.get(keys)) for keys in wanted)
        if not fits or set(found) != set(wanted):
            raise ValueError(checkpoints.NOT_WRITTEN)

    checkpoints.write(call, path, plain, about, check)
