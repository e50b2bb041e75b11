"""``jaxlora similarity``: what the subspaces of two sets of adapters have in common."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jaxlora import analysis
from jaxlora.analysis import plot
from jaxlora.analysis.subspaces import Side, Similarity
from jaxlora.cli import adapters_folder, output, pictures
from jaxlora.weights import paths


def similarity(
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder of adapters.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of any rank.")],
    side: Annotated[
        Side, typer.Option(help="Compare directions of the inputs, or of the outputs.")
    ] = "in",
    path: Annotated[
        str | None, typer.Option(help="The weight to draw; needed where there are several.")
    ] = None,
    picture: pictures.Picture = None,
    as_json: output.AsJson = False,
) -> None:
    """Show how much the first i directions of one have in common with the first j of the other.

    φ(i, j) is 1 where one subspace holds the other, and 0 where they are orthogonal; beside it
    stands what two random subspaces would have.

    Example: jaxlora similarity run_8 run_64 --path layer/query --plot phi.png
    """
    pictures.check(picture)
    sets = [adapters_folder.read(folder) for folder in (first, second)]
    for each in sets:
        adapters_folder.check_finite(each)
    with output.working("decomposing"):
        found = analysis.similarity(sets[0].adapters, sets[1].adapters, side)
    if picture is not None:
        pictures.write(plot.similarity(_drawn(found, path)), picture)
    if as_json:
        weights = {name: _report(found, name) for name in found}
        report = {"first": str(first), "second": str(second), "side": side}
        output.print_json(report | {"weights": weights, "left_out": [*found.left_out]})
        return
    output.print_table(("path", *found.header), [(name, *found.cells(name)) for name in found])
    for note in found.notes():
        print(f"\n{note}")


def _report(found: Similarity, path: str) -> dict[str, object]:
    return {
        "phi": np.asarray(found[path]).tolist(),
        "random": np.asarray(found.random[path]).tolist(),
    }


def _drawn(found: Similarity, path: str | None) -> np.ndarray:
    """Return φ of the weight that is to be drawn, the mean of the entries of its stack."""
    if path is None and len(found) > 1:
        raise ValueError(
            f"--path is needed to draw one of {len(found)} weights: {', '.join(found)}"
        )
    name = next(iter(found)) if path is None else path
    if name not in found.found:
        raise ValueError(f"no weight {name!r} is in both; {paths.nearest(name, found)}")
    phi = np.asarray(found[name])
    return phi.reshape(-1, *phi.shape[-2:]).mean(0)
