"""Folders of adapters of any kind, and files of diffusion models, read and written alike."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import typer

from jaxlora.cli import matrices, output
from jaxlora.formats import diffusion, peft
from jaxlora.formats.diffusion import described as of_file
from jaxlora.formats.diffusion import reading as diffusion_files
from jaxlora.formats.peft import config as peft_config
from jaxlora.formats.peft import config_keys, described
from jaxlora.formats.peft.described import Described
from jaxlora.formats.peft.writing import save_saying
from jaxlora.storage import adapters as saved
from jaxlora.storage import checkpoints, directories
from jaxlora.types import Json
from jaxlora.weights.adapters import Adapters

Kind = Literal["jaxlora", "peft", "diffusion"]
SHOWN: Mapping[Kind, str] = MappingProxyType(
    {
        "jaxlora": "a folder of jaxlora",
        "peft": "a folder of PEFT",
        "diffusion": "a file of a diffusion model",
    }
)


Given = Annotated[
    Path, typer.Argument(help="A folder of jaxlora or of PEFT, or a file of a diffusion model.")
]


@dataclasses.dataclass(frozen=True)
class AdaptersFolder:
    """A folder that was read.

    Attributes:
        path: where it is.
        kind: who wrote it.
        adapters: what it holds, by path; of PEFT by the paths that follow from its modules.
        about: what it says of itself: our description, PEFT's config, or the header of the file.
        described: what a folder of PEFT or a file tells of its modules.
    """

    path: Path
    kind: Kind
    adapters: Adapters
    about: Json
    described: Described | None = None

    @property
    def said(self) -> Json:
        """What a config of PEFT says beside its factors, where it says anything."""
        if self.kind != "peft":
            return {}
        found = config_keys.beside_factors(self.about)
        return {key: value for key, value in found.items() if value is not None}

    def __or__(self, other: "AdaptersFolder") -> "AdaptersFolder":
        """Return this folder with the modules of another, and what that says and this does not."""
        if self.described is None or other.described is None:
            return self
        about = self.about | {k: v for k, v in other.said.items() if k not in self.said}
        modules = self.described | other.described
        return dataclasses.replace(self, about=about, described=modules)

    @property
    def base_name(self) -> str | None:
        """What PEFT loads the base from, or kohya's scripts call it; None where it is not said."""
        key = "ss_base_model_version" if self.kind == "diffusion" else "base_model_name_or_path"
        return self.about.get(key)

    @property
    def bytes_on_disk(self) -> int:
        """The size of its files."""
        files = [self.path, *self.path.rglob("*")]
        return sum(file.stat().st_size for file in files if file.is_file())


def kind_of(path: Path) -> Kind:
    """Return who wrote a folder of adapters, or raise if it is none."""
    place = directories.standing(path.resolve())
    if not place.exists():
        raise FileNotFoundError(f"no adapters at {path}: there is no such folder")
    file = diffusion_files.file_of(path)
    if file.is_file() and file.suffix == ".safetensors":
        return "diffusion"
    if (place / peft_config.CONFIG_FILE).is_file():
        return "peft"
    if (place / checkpoints.MARK).is_file():
        return "jaxlora"
    raise ValueError(
        f"no adapters at {path}: a folder that jaxlora.save_adapters or PEFT wrote is needed, or a "
        "file of a diffusion model, .safetensors"
    )


def read(path: Path) -> AdaptersFolder:
    """Return what a folder of adapters holds, without their base.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no adapters, or damaged ones, or needs the program to be read.
    """
    path = path.expanduser()
    kind = kind_of(path)
    with output.working(f"reading {path}"):
        if kind == "jaxlora":
            found = saved.load_unbound(path)
            return AdaptersFolder(path, kind, found, saved.describe_saved(path))
        if kind == "diffusion":
            tree, header = of_file.described(path)
            found = diffusion.load(path, sites=tree.sites, names=tree.names)
            return AdaptersFolder(path, kind, found, header, tree)
        tree = described.described(path)
        found = peft.load(path, sites=tree.sites, names=tree.names)
        about = json.loads((path / peft_config.CONFIG_FILE).read_bytes())
        return AdaptersFolder(path, kind, found, about, tree)


def check_finite(found: AdaptersFolder) -> None:
    """Raise if an adapter holds NaN or inf, of which nothing can be computed."""
    for path, term in found.adapters.items():
        if bad := matrices.not_finite(term):
            raise ValueError(
                f"the adapter of {path!r} in {found.path} must be finite: {' and '.join(bad)} "
                "hold NaN or inf"
            )


def write(path: Path, adapters: Adapters, like: AdaptersFolder) -> None:
    """Write adapters to a folder of the kind of another, whose modules they are for."""
    if like.kind == "diffusion":
        raise ValueError(
            f"{like.path} is a file of a diffusion model, and folders are written: make one of "
            "it with jaxlora convert"
        )
    with output.working(f"writing {path}"):
        if like.described is None:
            saved.save_adapters(path.expanduser(), adapters)
            return
        names, sites = like.described.names, like.described.sites
        said = config_keys.beside_factors(like.about)
        save_saying(path.expanduser(), adapters, said, names=names, sites=sites)
