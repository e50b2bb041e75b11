"""Pictures of what an analysis finds; they need matplotlib, which the extra ``plot`` brings.

Each function draws into an ``Axes`` and returns it, for titles and for saving:
``ax.figure.savefig("it.png")``.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxlora.analysis.spectra import Spectra, Spectrum
from jaxlora.messages import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["energy", "similarity", "spectra", "training"]

_MOST = 12  # kinds of weights that styles of lines can tell apart, and names along an axis
_STYLES, _MARKERS = ("-", "--", ":", "-."), ("", ".", "x")


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One adapter, or one entry of its stack: its layer, and which weight of that it is of."""

    kind: str
    layer: int
    values: np.ndarray
    size: float


@dataclasses.dataclass(frozen=True)
class _Entries:
    """All of them, with the kinds of weights in order and the layers from the first on."""

    all: Sequence[_Entry]
    kinds: Sequence[str]
    layers: Sequence[int]

    @classmethod
    def of(cls, found: object) -> "_Entries":
        """Return every adapter, or each entry of its stack, or raise for what has none."""
        if not isinstance(found, Spectra):
            needed = "found must be from jaxlora.analysis.spectrum"
            raise TypeError(f"{needed}: got {checks.shown(found)}")
        has_shares = _has_shares(found)
        entries = [
            entry
            for path, each in found.items()
            for entry in _of_path(path, each, each.share if has_shares else each.norm)
        ]
        kinds = [*dict.fromkeys(entry.kind for entry in entries)]
        return cls(entries, kinds, sorted({entry.layer for entry in entries}))


def spectra(found: Spectra, ax: "Axes | None" = None) -> "Axes":
    """Draw the singular values of each adapter, a line for each weight of each layer.

    The layer is the first number in a path, or else the entry of the stack. The color tells it,
    and the style of the line the kind of weight; where there is one layer, the color does both.

    Args:
        found: from `jaxlora.analysis.spectrum`.
        ax: where to draw; None makes a new figure.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: found or ax is no such thing.
    """
    entries, ax = _Entries.of(found), _axes(ax)
    colors = _matplotlib("cm").ScalarMappable(cmap="viridis")
    colors.set_clim(entries.layers[0], entries.layers[-1])
    has_layers = len(entries.layers) > 1
    for entry in entries.all:
        style = _style(entries.kinds.index(entry.kind))
        label = f"{entry.kind}, layer {entry.layer}" if has_layers else entry.kind
        if has_layers:
            style["color"] = colors.to_rgba(entry.layer)
        ax.plot(np.arange(1, len(entry.values) + 1), entry.values, label=label, **style)
    is_trained = any(entry.values.any() for entry in entries.all)  # else nothing has a logarithm
    scale = "log" if is_trained else "linear"
    ax.set(xlabel="direction", ylabel="singular value of the product", yscale=scale)
    _count(ax.xaxis)
    if has_layers:
        _count(ax.figure.colorbar(colors, ax=ax, label="layer").ax.yaxis)
    if len(entries.kinds) <= _MOST:
        styles = [_style(i) | ({"color": "0.3"} if has_layers else {}) for i in range(_MOST)]
        line = _matplotlib("lines").Line2D
        handles = [line([], [], label=x, **y) for x, y in zip(entries.kinds, styles, strict=False)]
        ax.legend(handles=handles, fontsize="small")
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
    entries, ax = _Entries.of(found), _axes(ax)
    image = np.full((len(entries.kinds), len(entries.layers)), np.nan)
    for entry in entries.all:
        image[entries.kinds.index(entry.kind), entries.layers.index(entry.layer)] = entry.size
    drawn = ax.imshow(image, aspect="auto", cmap="viridis")
    ax.set_xlabel("layer")
    _names(ax.set_xticks, entries.layers)
    _names(ax.set_yticks, entries.kinds)
    if _has_shares(found):
        percent = _matplotlib("ticker").PercentFormatter(1)
        ax.figure.colorbar(drawn, ax=ax, format=percent, label="norm, share of the weight's")
    else:
        ax.figure.colorbar(drawn, ax=ax, label="norm of the product")
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
    ax.set(xlabel="first j directions of the second", ylabel="first i directions of the first")
    _count(ax.xaxis)
    _count(ax.yaxis)
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
    _count(ax.xaxis)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _numbers(run: object, name: str) -> list[float]:
    """Return the losses of a run, or raise for what are none."""
    found = checks.check_numbers(run, f"losses[{name!r}]")
    if not found:
        raise ValueError(f"losses[{name!r}] must have at least one step: got none")
    return found


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


def _has_shares(found: Spectra) -> bool:
    return all(each.weight_norm is not None for each in found.values())


def _style(kind: int) -> dict[str, Any]:
    """Return how the lines of a kind of weight look, all that are not colored by layer."""
    marker = _MARKERS[kind // len(_STYLES) % len(_MARKERS)]
    return {"linestyle": _STYLES[kind % len(_STYLES)], "marker": marker, "color": f"C{kind}"}


def _count(axis: Any) -> None:
    """Let the ticks of an axis be whole numbers."""
    axis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True))


def _names(set_ticks: Callable[..., object], names: Sequence[object]) -> None:
    """Write names at an axis, of many only every second or so."""
    every = math.ceil(len(names) / _MOST)
    set_ticks(range(0, len(names), every), names[::every])


def _axes(ax: "Axes | None") -> "Axes":
    """Return where to draw, or raise for what is no such thing."""
    pyplot = _matplotlib("pyplot")
    if ax is None:
        return pyplot.figure(layout="constrained").add_subplot()
    if not hasattr(ax, "imshow"):
        raise TypeError(f"ax must be an Axes of matplotlib, or None: got {checks.shown(ax)}")
    return ax


def _matplotlib(part: str) -> Any:
    """Return a module of matplotlib."""
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ImportError("pictures need matplotlib: install jaxlora[plot]") from error
