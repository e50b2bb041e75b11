"""``jaxlora combine``: several folders of adapters as one."""

from pathlib import Path
from typing import Annotated, get_args

import jax
import typer

from jaxlora.cli import adapters_folder, output
from jaxlora.cli.adapters_folder import AdaptersFolder
from jaxlora.formats import peft
from jaxlora.messages import checks

METHODS = get_args(peft.CombinationType)


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
                f"folders must be of one kind: {first.path} is of {first.kind}, {other.path} of "
                f"{other.kind}; see jaxlora convert"
            )
        if other.base_name != first.base_name:
            shown = checks.shown(first.base_name), checks.shown(other.base_name)
            raise ValueError(
                f"folders must be for one base: {first.path} is for {shown[0]}, {other.path} for "
                f"{shown[1]}"
            )
        first = first | other
    return first
