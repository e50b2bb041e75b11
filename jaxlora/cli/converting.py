"""``jaxlora convert``: adapters from one kind of folder to another."""

from pathlib import Path
from typing import Annotated

import typer

from jaxlora.cli import adapters_folder, named_objects, output
from jaxlora.cli.adapters_folder import AdaptersFolder
from jaxlora.formats import Names, diffusion, peft
from jaxlora.formats.names.pairs import Layout
from jaxlora.formats.peft import described
from jaxlora.storage import adapters as saved
from jaxlora.targets.sites import Sites
from jaxlora.weights.adapters import Adapter, Adapters


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="What is to be converted.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    names: Annotated[
        str | None,
        typer.Option(
            help="module:object or file.py:object, a jaxlora.formats.Names: which modules of PEFT "
            "are which leaves of your tree."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="module:function or file.py:function, without arguments, that returns (fn, "
            "params, *args) as jaxlora.find_sites takes them; shapes are enough."
        ),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base", help="What PEFT is to load the base from.")
    ] = None,
    as_json: output.AsJson = False,
) -> None:
    """Write a folder of PEFT as one of jaxlora, or the other way round.

    A file of a diffusion model becomes a folder of jaxlora too.

    Without names, the module "encoder.0.query" is the weight "encoder/0/query/kernel", or
    "/embedding" where rows of it are looked up, and each module is one leaf. With names, leaves
    may hold stacks and parts; from PEFT that takes the model too, which tells how weights lie.

    Example: jaxlora convert adapter_of_peft run --names my_model:NAMES --model my_model:example
    """
    source, target = source.expanduser(), target.expanduser()
    known = None if names is None else named_objects.names(names)
    sites = None if model is None else named_objects.sites(model)
    if adapters_folder.kind_of(source) != "jaxlora":
        adapters, to = _from_others(source, known, sites), "jaxlora"
        with output.working(f"writing {target}"):
            saved.save_adapters(target, adapters)
    else:
        adapters, to = saved.load_unbound(source), "peft"
        with output.working(f"writing {target}"):
            known = known or names_of(adapters)
            peft.save(target, adapters, names=known, sites=sites, base_model_name_or_path=base_name)
    if as_json:
        report = {"source": str(source), "target": str(target), "kind": to, "paths": [*adapters]}
        output.print_json(report)
    else:
        print(f"{target}: {len(adapters)} adapters, {adapters_folder.SHOWN[to]}")


def _from_others(source: Path, names: Names | None, sites: Sites | None) -> Adapters:
    """Return the adapters of a folder of PEFT or of a file of a diffusion model."""
    if (names is None) != (sites is None):
        lacking = "--model" if sites is None else "--names"
        raise ValueError(
            f"{lacking} is missing: {source} is read with both names and a model, or "
            "with neither, if each module is a leaf of its own"
        )
    if names is not None and sites is not None:
        is_peft = adapters_folder.kind_of(source) == "peft"
        return (peft if is_peft else diffusion).load(source, names=names, sites=sites)
    found = adapters_folder.read(source)
    _check_leaves(found)
    return found.adapters


def _check_leaves(found: AdaptersFolder) -> None:
    """Raise if the folder has whole weights, which lie otherwise than in a tree, or no paths."""
    for path, term in found.adapters.items():
        if found.kind == "diffusion" and path.count("/") == 1:
            raise ValueError(
                f"{found.path} has the module {path.partition('/')[0]!r}, whose name has no dots "
                "to tell its place in a tree: --names and --model are needed"
            )
        if not isinstance(term, Adapter) and len(term.shape) > 1:
            raise ValueError(
                f"{found.path} has the whole weight {path!r}, and does not tell how it lies in a "
                "tree: --names and --model are needed"
            )


def names_of(adapters: Adapters) -> Names:
    """Return names that follow from the paths of adapters, or raise where none do."""
    paths: dict[str, dict[str, str]] = {"kernel": {}, "embedding": {}, "bias": {}}
    for path, term in adapters.items():
        module, _, leaf = path.rpartition("/")
        is_plain = not isinstance(term, Adapter) or (
            len(term.roles.in_) == 1 and not term.roles.stack and term.block is None
        )
        if not is_plain or not module or leaf not in paths:
            raise ValueError(
                f"no name of PEFT follows from {path!r}: a matrix 'module/kernel' or "
                "'module/embedding' is needed, or --names"
            )
        name = module.replace("/", ".")
        paths[leaf][f"{name}.bias" if leaf == "bias" else name] = path
    layouts: dict[str, Layout] = {"kernel": "linear", "embedding": "embedding", "bias": "linear"}
    return Names(*(described.pair(found, layouts[leaf]) for leaf, found in paths.items() if found))
