"""``jaxlora truncate``: adapters of a smaller rank."""

from pathlib import Path
from typing import Annotated

import typer

from jaxlora import algebra
from jaxlora.cli import adapters_folder, output
from jaxlora.cli.matrices import Matrices
from jaxlora.linalg.matrices import check_linear
from jaxlora.messages import checks


def truncate(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of jaxlora or of PEFT.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write, of its kind.")
    ],
    rank: Annotated[int | None, typer.Option(help="The largest rank to keep.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="The share of the squared norm of each product to keep, in (0, 1]: each weight "
            "gets the least rank that does, a stack that of the entry that needs most."
        ),
    ] = None,
    as_json: output.AsJson = False,
) -> None:
    """Write the nearest adapters of a smaller rank, by the singular values of each product.

    Example: jaxlora truncate run run_small --energy 0.99
    """
    if (rank is None) == (energy is None):
        raise ValueError(
            "one of --rank and --energy is needed: got " + ("both", "none")[rank is None]
        )
    found = adapters_folder.read(source)
    adapters_folder.check_finite(found)
    rows = []
    smaller = {}
    for path, adapter in output.track([*check_linear(found.adapters).items()], "truncating"):
        product = Matrices.from_adapter(adapter)
        kept = rank if rank is not None else product.rank_of_energy(_share(energy))
        smaller[path] = algebra.truncate({path: adapter}, kept)[path]
        is_kept = product.energy(smaller[path].rank)
        rows.append({"path": path, "rank": [adapter.rank, smaller[path].rank], "energy": is_kept})
    adapters_folder.write(target, smaller, found)
    if as_json:
        output.print_json({"source": str(source), "target": str(target), "weights": rows})
        return
    cells = [(r["path"], *map(str, r["rank"]), output.number(r["energy"])) for r in rows]
    output.print_table(("path", "rank", "now", "energy kept"), cells)
    print(f"\n{target}: {len(rows)} adapters")


def _share(energy: float | None) -> float:
    return checks.check_number(energy, "energy", "in (0, 1]")
