"""``jaxlora combine``: several folders of adapters as one."""

import warnings
from pathlib import Path
from typing import Annotated

import jax
import typer

from jaxlora.cli import adapters_folder, output
from jaxlora.cli.adapters_folder import SHOWN, AdaptersFolder
from jaxlora.formats import peft
from jaxlora.formats.peft.config import CONFIG_FILE
from jaxlora.messages import checks

_BASE = ("base_model_name_or_path", "revision")  # what names a base in a config of PEFT


def combine(
    folders: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Folders of one kind.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, of the same kind.")],
    weights: Annotated[
        str | None, typer.Option(help="A number for each folder, as 0.7,0.3; by default all are 1.")
    ] = None,
    method: Annotated[
        peft.CombinationType,
        typer.Option(
            help="cat is the exact sum, its ranks added up; svd and ..._svd the nearest of a rank; "
            "the others sum the factors, which is rough."
        ),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result, for svd; by default the largest.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the elements that ties, dare and prune keep.")
    ] = None,
    majority: Annotated[
        peft.MajoritySignMethod, typer.Option(help="Whose sign wins, for ties.")
    ] = "total",
    seed: Annotated[int, typer.Option(help="Seed of what dare draws.")] = 0,
    as_json: output.AsJson = False,
) -> None:
    """Add several folders of adapters up, weighted and by a method.

    The names of methods are those of PEFT's add_weighted_adapter. A path that only some of the
    folders have is combined from those.

    Example: jaxlora combine polite brief both --weights 0.7,0.3 --method svd --rank 8
    """
    if len(folders) == 1 and out.expanduser().exists():
        raise ValueError(
            f"two folders were given, of which the last is the one to write: {out} is there, and "
            "would be lost; name another behind it"
        )
    read = [adapters_folder.read(folder) for folder in output.track(folders, "reading")]
    for found in read:
        adapters_folder.check_finite(found)
    with output.working("combining"):
        combined = peft.combine(
            [found.adapters for found in read],
            [1.0] * len(read) if weights is None else _numbers(weights),
            method,
            svd_rank=rank,
            density=density,
            majority_sign_method=majority,
            key=jax.random.key(seed) if method.startswith("dare") else None,
        )
    adapters_folder.write(out, combined, _like(read))
    ranks = {path: adapter.rank for path, adapter in combined.items()}
    if as_json:
        output.print_json({"out": str(out), "folders": [*map(str, folders)], "ranks": ranks})
    else:
        print(f"{out}: {len(ranks)} adapters, ranks {output.spread(ranks.values())}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"weights must be numbers, as 0.7,0.3: got {text!r}") from error


def _like(read: list[AdaptersFolder]) -> AdaptersFolder:
    """Return a folder of the kind and with the modules of several."""
    first = read[0]
    for other in read[1:]:
        if other.kind != first.kind:
            raise ValueError(
                f"folders must be of one kind: {first.path} is {SHOWN[first.kind]}, {other.path} "
                f"is {SHOWN[other.kind]}; see jaxlora convert"
            )
        _check_base(first, other)
        first = first | other
    return first


def _check_base(first: AdaptersFolder, other: AdaptersFolder) -> None:
    """Raise if two folders are for different bases, warn of what else they differ in."""
    both = {key: (first.said[key], other.said[key]) for key in first.said if key in other.said}
    differing = {key: said for key, said in both.items() if said[0] != said[1]}
    for key in _BASE:
        if key in differing:
            shown = [checks.shown(x) for x in differing[key]]
            raise ValueError(
                f"folders must be for one base: {key} is {shown[0]} in {first.path}, {shown[1]} in "
                f"{other.path}; where both mean the same, edit one {CONFIG_FILE}"
            )
        with_it, without = (first, other) if key in first.said else (other, first)
        if key in with_it.said and key not in without.said:
            warnings.warn(
                f"{without.path} has no {key}: taken to be {checks.shown(with_it.said[key])}, as "
                f"{with_it.path} has it",
                stacklevel=2,
            )
    if differing:
        warnings.warn(
            f"{other.path} has another {' and '.join(differing)} in its {CONFIG_FILE} than "
            f"{first.path}, whose is kept",
            stacklevel=2,
        )
