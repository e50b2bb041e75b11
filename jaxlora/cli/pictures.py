"""Pictures that commands write with ``--plot``."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Picture = Annotated[
    Path | None, typer.Option("--plot", metavar="F", help="Write a picture there too: .png, .svg.")
]


def check(path: Path | None) -> None:
    """Raise before work is done for a picture that could not be written."""
    if path is None:
        return
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("pictures need matplotlib: install jaxlora[plot]") from error
    mpl.use("agg")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(
            f"the picture must end in one of {', '.join(f'.{kind}' for kind in known)}: got {path}"
        )
    if not path.expanduser().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the picture")


def write(ax: "Axes", path: Path) -> None:
    """Write the picture of an axes, whole or not at all."""
    target = path.expanduser()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        figure: Any = ax.figure
        figure.savefig(made, dpi=150)
        os.replace(made, target)
