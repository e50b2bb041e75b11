"""Write adapters of diffusion models to one file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import jax

from jaxlora.formats import arguments, streaming, tensors
from jaxlora.formats.diffusion import keys, styles
from jaxlora.formats.diffusion.metadata import METADATA
from jaxlora.formats.modules import Module, check_written, modules
from jaxlora.formats.names.mapping import Names
from jaxlora.messages import checks
from jaxlora.storage import processes, replacing
from jaxlora.storage.locations import PathLike
from jaxlora.targets.sites import Sites
from jaxlora.weights.adapters import Adapter, Adapters

Style = Literal["diffusers", "kohya"]


def save(
    path: PathLike,
    adapters: Adapters,
    *,
    names: Names,
    style: Style = "diffusers",
    sites: Sites | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write adapters to a file of safetensors that diffusers or kohya's scripts load.

    The file is there whole, or what was there before is as it was. In the style of diffusers its
    header has the configs that tell alpha; in that of kohya's scripts each module has its alpha
    beside it, and the header says the rank. ComfyUI and LyCORIS read both.

    Args:
        path: a file that is not there, or one of adapters.
        adapters: adapters by path, as of `jaxlora.split`; arrays that are spread over devices or
            processes are gathered. Every process calls it.
        names: which modules are which leaves, see `load`.
        style: ``"diffusers"`` or ``"kohya"``.
        sites: where adapters can go, from `jaxlora.find_sites`. It is needed for convolutions, of
            which only the program tells which axes are the window; for text encoders in the style
            of kohya's scripts; and where a module's name ends as that of one that is not adapted.
        metadata: what else the header is to say, as
            ``{"ss_base_model_version": "sdxl_base_v1-0"}``.

    Raises:
        FileExistsError: something else is there.
        ImportError: a file is there, and safetensors, which tells what it is, is not installed.
        TypeError: an argument is of the wrong kind, or adapters are traced by JAX.
        ValueError: an adapter has no name in the file, or such files cannot say it; the path ends
            as that of a folder.
        OSError: it cannot be written.
    """
    arguments.check_saved("diffusion.save", adapters, names, sites)
    checks.check_choice(style, "style", get_args(Style))
    more = _checked(metadata)
    target = arguments.local(path)
    if os.fspath(path).endswith("/"):
        raise ValueError(f"the path must be that of a file: got {os.fspath(path)!r}, a folder's")
    adapters = {path: jax.tree.map(processes.whole, term) for path, term in adapters.items()}
    found = _modules(adapters, names)
    table = [*names.table(sites.shapes)] if sites is not None else []
    write = styles.kohya if style == "kohya" else styles.diffusers
    made, said = write(found, table, sites)
    if both := {*said, METADATA, "format"} & more.keys():
        raise ValueError(f"metadata must not have {sorted(both)}, which save writes itself")
    replacing.replace_from_first(
        "diffusion.save",
        target,
        lambda place: streaming.write_arrays(place, made, {**streaming.PYTORCH, **said, **more}),
        lambda place: _check_free(place, target),
    )


def _checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    found = {} if metadata is None else metadata
    is_text = isinstance(found, Mapping) and all(
        isinstance(x, str) for pair in found.items() for x in pair
    )
    if not is_text:
        raise TypeError(f"metadata must be strings by name, or None: got {checks.shown(metadata)}")
    return dict(found)


def _modules(adapters: Adapters, names: Names) -> list[Module]:
    """Return the modules that are written."""
    for name, term in adapters.items():
        if not isinstance(term, Adapter):
            raise ValueError(
                f"{name!r} is replaced, and files of diffusion models have factors alone: merge it"
            )
    check_written(adapters)
    found = [*modules(adapters, names)]
    for module in found:
        if module.entries > 1 or module.place.layout == "embedding":
            what = "an embedding" if module.entries == 1 else "several weights in one module"
            raise ValueError(
                f"{str(module.place)!r} is {what}, for which files of diffusion models have no "
                "factors: leave it out, or merge it"
            )
    return found


def _check_free(place: Path, target: Path) -> None:
    """Raise if something stands there that is no file of adapters."""
    if not place.exists():
        return
    if place.is_file():
        try:
            with tensors.opened(place) as file:
                if file.shapes and all(map(keys.parse, file.shapes)):
                    return
        except ValueError:
            pass
    raise FileExistsError(
        f"{target} is no file of adapters, and would be lost: choose another path"
    )
