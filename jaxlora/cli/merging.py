"""``jaxlora merge``: adapters folded into the weights of their base."""

from pathlib import Path
from typing import Annotated

import typer

from jaxlora.cli import adapters_folder, output
from jaxlora.formats.safetensors import shards
from jaxlora.formats.safetensors.merging import merge_checkpoint
from jaxlora.storage import adapters as saved
from jaxlora.storage import merged, trees
from jaxlora.trees.binding import bind
from jaxlora.trees.merging import merge as merge_tree
from jaxlora.types import PyTree
from jaxlora.weights import paths

NEEDED = (
    "merging needs a base and adapters of one kind: an Orbax checkpoint and a folder of jaxlora, "
    "or a checkpoint of Hugging Face and a folder of PEFT"
)


def merge(
    base: Annotated[Path, typer.Argument(help="An Orbax checkpoint, or one of Hugging Face.")],
    adapters: Annotated[Path, typer.Argument(help="A folder of jaxlora, or of PEFT.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, of the kind of the base.")],
    as_json: output.AsJson = False,
) -> None:
    """Fold adapters into the weights of their base, and write plain weights.

    Each weight is summed in float32 and rounded once to its own dtype. An Orbax checkpoint with a
    folder of jaxlora is written as an Orbax checkpoint, and is refused if it is not the base that
    the adapters were made for. A checkpoint of Hugging Face (safetensors) with a folder of PEFT is
    written as another, one tensor at a time; config.json and the tokenizer are not copied.

    Example: jaxlora merge base run merged
    """
    base, out = base.expanduser(), out.expanduser()
    if out.resolve() == (base.parent if base.is_file() else base).resolve():
        raise ValueError(f"out must be another folder than that of the base: got {out} for both")
    kind = adapters_folder.kind_of(adapters.expanduser())
    if not (is_of_hub := _is_of_hub(base)):
        trees.check_is_tree(base)
    if kind != ("peft" if is_of_hub else "jaxlora"):
        got = "one of Hugging Face" if is_of_hub else "one of Orbax"
        shown = adapters_folder.SHOWN[kind]
        raise ValueError(f"{NEEDED}: got {got} and {shown}; see jaxlora convert")
    count = _merge_hub(base, adapters, out) if is_of_hub else _merge_tree(base, adapters, out)
    if as_json:
        output.print_json({"base": str(base), "adapters": str(adapters), "out": str(out), **count})
    else:
        print(f"{out}: {count['merged']} of {count['weights']} weights merged")


def _is_of_hub(base: Path) -> bool:
    """Tell whether a path is that of a checkpoint of Hugging Face."""
    return base.suffix in (".safetensors", ".json") or any(
        (base / name).is_file() for name in (shards.FILE, shards.INDEX)
    )


def _merge_tree(base: Path, folder: Path, out: Path) -> dict[str, int]:
    """Merge a folder of jaxlora into a tree, each weight in the place of its base."""
    with output.working(f"reading {base}"):
        tree = trees.read(base)
    adapters = saved.load_adapters(folder, base=tree)
    leaves, treedef = paths.flatten(bind(tree, adapters))
    del tree
    adapted = [path for path, leaf in leaves.items() if paths.is_trained(leaf)]
    for path in output.track(adapted, "merging"):
        leaves[path] = merge_tree({path: leaves[path]}, donate=True)[path]
    _write_tree(out, treedef.unflatten(leaves.values()))
    return {"merged": len(adapted), "weights": len(leaves)}


def _write_tree(out: Path, tree: PyTree) -> None:
    with output.working(f"writing {out}"):
        merged.write("merge", out, tree)


def _merge_hub(base: Path, folder: Path, out: Path) -> dict[str, int]:
    """Merge a folder of PEFT into a checkpoint of Hugging Face."""
    found = adapters_folder.read(folder)
    assert found.described is not None
    names, sites = found.described.names, found.described.sites
    with output.bar() as shown:
        task = shown.add_task("merging", total=None)

        def begun(total: int) -> None:
            shown.update(task, total=total, advance=1)

        merge_checkpoint(base, found.adapters, out, names=names, sites=sites, at_each=begun)
        total = shown.tasks[task].total
    return {"merged": len(found.adapters), "weights": int(total or 0)}
