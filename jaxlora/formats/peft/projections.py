"""Factors of VeRA: two matrices that all modules share, scaled by vectors that each has.

Kopiczko et al. 2023, arXiv:2310.11454. A module takes the first columns and rows of the shared
matrices, as many as it has.
"""

import math

import numpy as np

from jaxlora.formats.factorizations import wide
from jaxlora.formats.factors import Factors, Tensors
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
    first, second = _shared(folder)
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
    a, b = how.factors(columns[:, None] * first[:, :width], rows[:, None] * second[:height], shape)
    return Factors(a.reshape(*stack, *in_, rank), b.reshape(*stack, rank, *out), rank)


def _shared(folder: Folder) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices that all modules share, ``(rank, in)`` and ``(out, rank)``."""
    shapes = [folder.file.shapes.get(name) for name in SHARED]
    if None in shapes:
        raise ValueError(
            f"{folder.where} must have {SHARED}, which torch would draw again from a key: save it "
            "with save_projection=True in PEFT's VeraConfig"
        )
    first, second = (folder.file[name] for name in SHARED)
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        raise ValueError(
            f"{SHARED} of {folder.where} must be (rank, in) and (out, rank): got {shapes}"
        )
    return first, second
