"""Factors of VeRA: two matrices that all modules share, scaled by vectors that each has.

Kopiczko et al. 2023, arXiv:2310.11454. A module takes the first columns and rows of the shared
matrices, as many as it has.
"""

import math

from jaxlora.formats.factorizations import wide
from jaxlora.formats.factors import Factors, Tensors, of_pair
from jaxlora.formats.layouts import Arrangement
from jaxlora.formats.names.mapping import Place
from jaxlora.formats.peft.folder import Folder
from jaxlora.formats.peft.keys import SHARED


def are_of(own: Tensors) -> bool:
    """Tell whether the tensors of a module are of VeRA."""
    return not own.keys().isdisjoint(("lambda_b", "lambda_d"))


def read(folder: Folder, own: Tensors, place: Place, how: Arrangement) -> Factors:
    """Return the factors of a module.

    Raises:
        ValueError: a vector lacks, the shared matrices are not in the file, or a shape is another.
    """
    _, shape = folder.box(place)
    stack, in_, out = how.roles.sizes(shape)
    first, second = folder.projections
    rank, width, height = first.shape[0], math.prod(in_), math.prod(out)
    if math.prod(stack) != 1 or first.shape[1] < width or second.shape[0] < height:
        raise ValueError(
            f"the place {str(place)!r} must be one weight of at most {first.shape[1]} in and "
            f"{second.shape[0]} out, as {SHARED} of {folder.where} are: got {shape}"
        )
    if lacking := {"lambda_b", "lambda_d"} - own.keys():
        raise ValueError(
            f"{folder.where} has {next(iter(own.values()))!r}, and no tensor {min(lacking)} "
            "beside it"
        )
    columns = wide(folder.tensor(own["lambda_d"], place, (rank,)))
    rows = wide(folder.tensor(own["lambda_b"], place, (height,)))
    pair = columns[:, None] * first[:, :width], rows[:, None] * second[:height]
    return of_pair(*pair, how, shape, rank)
