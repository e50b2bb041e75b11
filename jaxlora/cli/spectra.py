"""``jaxlora spectrum``: the singular values of what adapters add."""

import numpy as np

from jaxlora import analysis
from jaxlora.analysis import plot
from jaxlora.analysis.spectra import Spectrum
from jaxlora.cli import adapters_folder, output, pictures
from jaxlora.types import Json


def spectrum(
    folder: adapters_folder.Given,
    picture: pictures.Picture = None,
    as_json: output.AsJson = False,
) -> None:
    """Show the singular values of what each adapter adds, and whether its rank was needed.

    Example: jaxlora spectrum run --plot run.png
    """
    pictures.check(picture)
    read = adapters_folder.read(folder)
    adapters_folder.check_finite(read)
    with output.working("decomposing"):
        found = analysis.spectrum(read.adapters)
    if picture is not None:
        pictures.write(plot.spectra(found), picture)
    if as_json:
        weights = {path: _report(each) for path, each in found.items()}
        output.print_json(
            {"folder": str(folder), "weights": weights, "left_out": [*found.left_out]}
        )
        return
    rows = [(path, *found.cells(path)) for path in found]
    output.print_table(("path", *found.header), rows)
    for note in found.notes():
        print(f"\n{note}")


def _report(found: Spectrum) -> Json:
    """Return what is found of one weight, as JSON has it; each number by entry of the stack."""
    numbers = {
        "values": found.values,
        "norm": found.norm,
        "effective_rank": found.effective_rank,
        "stable_rank": found.stable_rank,
        "energy": found.energy,
        "dead": found.dead,
    }
    return {name: np.asarray(array).tolist() for name, array in numbers.items()}
