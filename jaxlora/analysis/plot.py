"""Pictures of what an analysis finds; they need matplotlib, which the extra ``plot`` brings.

Each function draws into an ``Axes`` and returns it, for titles and for saving:
``ax.figure.savefig("it.png")``.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxlora.analysis.spectra import Spectra, Spectrum
from jaxlora.messages import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["energy", "similarity", "spectra", "training"]

_MOST = 12  # lines that a legend names one by one


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One adapter, or one entry of its stack: its layer, and which weight of that it is of."""

    kind: str
    layer: int
    values: np.ndarray
    size: float


def spectra(found: Spectra, ax: "Axes | None" = None) -> "Axes":
    """Draw the singular values of each adapter, a line for each weight of each layer.

    The layer is the first number in a path, or else the entry of the stack.

    Args:
        found: from `jaxlora.analysis.spectrum`.
        ax: where to draw; None makes a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: found or ax is no such thing.
    """
    entries, ax = _entries(found), _axes(ax)
    kinds, layers = _kinds(entries), sorted({entry.layer for entry in entries})
    colors = _pyplot().get_cmap("viridis")(np.linspace(0, 0.85, len(layers)))
    for entry in entries:
        style = ("-", "--", ":", "-.")[kinds.index(entry.kind) % 4]
        label = f"{entry.kind}, layer {entry.layer}" if len(layers) > 1 else entry.kind
        color = colors[layers.index(entry.layer)]
        ranks = np.arange(1, len(entry.values) + 1)
        ax.semilogy(ranks, entry.values, label=label, color=color, linestyle=style)
    ax.set(xlabel="direction", ylabel="singular value of the product")
    if len(entries) <= _MOST:
        ax.legend(frameon=False, fontsize="small")
    return ax


def energy(found: Spectra, ax: "Axes | None" = None) -> "Axes":
    """Draw how large the product of each adapter is, by layer and kind of weight.

    It is the norm over that of the weight, where all weights are known, else the norm.

    Args:
        found: from `jaxlora.analysis.spectrum`.
        ax: where to draw; None makes a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: found or ax is no such thing.
    """
    entries, ax = _entries(found), _axes(ax)
    kinds, layers = _kinds(entries), sorted({entry.layer for entry in entries})
    image = np.full((len(kinds), len(layers)), np.nan)
    for entry in entries:
        image[kinds.index(entry.kind), layers.index(entry.layer)] = entry.size
    drawn = ax.imshow(image, aspect="auto", cmap="viridis")
    ax.set(xlabel="layer", xticks=range(len(layers)), xticklabels=layers)
    ax.set(yticks=range(len(kinds)), yticklabels=kinds)
    what = "norm of the product over that of the weight" if _has_shares(found) else "norm"
    ax.figure.colorbar(drawn, ax=ax, label=what)
    return ax


def similarity(phi: jax.Array | np.ndarray, ax: "Axes | None" = None) -> "Axes":
    """Draw the similarity of subspaces as a heat map (figure 3 of arXiv:2106.09685).

    Args:
        phi: φ of one weight, ``(r1, r2)``, as `jaxlora.analysis.similarity` has it by path; an
            entry of it where the weight is a stack.
        ax: where to draw; None makes a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: phi or ax is no such thing.
        ValueError: phi is no matrix.
    """
    if not isinstance(phi, jax.Array | np.ndarray):
        raise TypeError(f"phi must be an array (r1, r2): got {checks.shown(phi)}")
    if phi.ndim != 2 or not phi.size:
        raise ValueError(f"phi must be of one weight, (r1, r2): got {phi.shape}")
    ax = _axes(ax)
    rows, columns = phi.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)  # directions count from 1
    drawn = ax.imshow(np.asarray(phi), vmin=0, vmax=1, aspect="auto", extent=extent, cmap="magma")
    ax.set(xlabel="directions j of the second", ylabel="directions i of the first")
    ax.figure.colorbar(drawn, ax=ax, label="φ(i, j)")
    return ax


def training(losses: Mapping[str, Sequence[float] | ArrayLike], ax: "Axes | None" = None) -> "Axes":
    """Draw the losses of training runs, each faint and its running mean on top.

    Args:
        losses: the loss of every step, by the name of the run.
        ax: where to draw; None makes a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: losses are no numbers by name, or ax is no ``Axes``.
        ValueError: there are none.
    """
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"losses must be numbers by the name of the run: got {checks.shown(losses)}"
        )
    if not losses:
        raise ValueError("losses must have at least one run: got none")
    runs = {name: np.array(_numbers(run, name)) for name, run in losses.items()}
    ax = _axes(ax)
    for name, run in runs.items():
        width = max(1, len(run) // 20)
        mean = np.convolve(run, np.full(width, 1 / width), "valid")
        (line,) = ax.plot(np.arange(width, len(run) + 1), mean, label=name)
        ax.plot(np.arange(1, len(run) + 1), run, color=line.get_color(), alpha=0.25, linewidth=0.8)
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(frameon=False, fontsize="small")
    return ax


def _numbers(run: object, name: str) -> list[float]:
    """Return the losses of a run, or raise for what are none."""
    found = checks.check_numbers(run, f"losses[{name!r}]")
    if not found:
        raise ValueError(f"losses[{name!r}] must have at least one step: got none")
    return found


def _entries(found: object) -> list[_Entry]:
    """Return every adapter, or each entry of its stack, or raise for what has none."""
    if not isinstance(found, Spectra):
        needed = "found must be from jaxlora.analysis.spectrum"
        raise TypeError(f"{needed}: got {checks.shown(found)}")
    of_share = _has_shares(found)
    return [
        entry
        for path, each in found.items()
        for entry in _of_path(path, each, each.share if of_share else each.norm)
    ]


def _of_path(path: str, each: Spectrum, size: jax.Array | None) -> Iterator[_Entry]:
    stack = each.values.shape[:-1]
    values = np.asarray(each.values).reshape(math.prod(stack), -1)
    number = re.search(r"\d+", path)
    for i, (row, one) in enumerate(zip(values, np.asarray(size).reshape(-1), strict=True)):
        if number is None:
            yield _Entry(path, i, row, float(one))
        else:
            kind = f"{path[: number.start()]}*{path[number.end() :]}"
            yield _Entry(f"{kind}[{i}]" if stack else kind, int(number[0]), row, float(one))


def _kinds(entries: Sequence[_Entry]) -> list[str]:
    return [*dict.fromkeys(entry.kind for entry in entries)]


def _has_shares(found: Spectra) -> bool:
    return all(each.weight_norm is not None for each in found.values())


def _axes(ax: "Axes | None") -> "Axes":
    """Return where to draw, or raise for what is no such thing."""
    pyplot = _pyplot()
    if ax is None:
        return pyplot.figure(layout="constrained").add_subplot()
    if not hasattr(ax, "imshow"):
        raise TypeError(f"ax must be an Axes of matplotlib, or None: got {checks.shown(ax)}")
    return ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: install jaxlora[plot]") from error
    return pyplot
