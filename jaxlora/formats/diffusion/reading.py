"""Read adapters of diffusion models from one file."""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxlora.formats import arguments, factors, pieces, tensors
from jaxlora.formats.diffusion import keys, spellings
from jaxlora.formats.diffusion.metadata import METADATA, Metadata
from jaxlora.formats.factors import Tensors
from jaxlora.formats.names.mapping import Names, missing
from jaxlora.formats.peft import targets
from jaxlora.formats.pieces import Piece
from jaxlora.formats.source import Source
from jaxlora.storage.locations import PathLike
from jaxlora.targets.sites import Sites, check_sites
from jaxlora.weights.adapters import Adapters

FILE = "pytorch_lora_weights.safetensors"  # which diffusers writes to a folder


def load(path: PathLike, *, sites: Sites, names: Names, ignore: Sequence[str] = ()) -> Adapters:
    """Return the adapters of a file of diffusers, kohya's scripts, LyCORIS or ComfyUI.

    Every tensor of the file is used; anything else is an error. What scales a product is exact:
    ``alpha`` where the file has one, what the metadata of diffusers say, else 1.

    Args:
        path: a file of safetensors, or a folder with a ``pytorch_lora_weights.safetensors``.
        sites: where adapters can go in the tree that they are for, from `jaxlora.find_sites`.
        names: which modules are which leaves. A name has the component of the pipeline first, as
            in ``"unet.mid_block.attentions.0.proj_in"`` or ``"text_encoder.encoder.layers.0.fc1"``;
            other spellings follow from it: ``lora_unet_`` and ``lora_te_`` with underscores for
            dots, ``diffusion_model.``, ``lycoris_``.
        ignore: names of tensors that are not wanted, as regular expressions for whole names: of a
            component that is not in the tree, ``("lora_te_.*",)``.

    Returns:
        Adapters by path, for `jaxlora.bind`. LoHa, and the windows that LoCon has of their own,
        are the factors that they amount to, in float32; others keep the dtype of the file.

    Raises:
        FileNotFoundError: there is no file.
        ImportError: safetensors is not installed.
        TypeError: an argument is of the wrong kind.
        ValueError: the file is damaged; a tensor is not understood, has no place, another shape
            than its place needs, or is missing; the metadata say what adapters here cannot.
    """
    check_sites(sites)
    arguments.check_names(names)
    unwanted = arguments.expressions(ignore)
    table = names.table(sites.shapes)

    def read(place: Path) -> Adapters:
        with tensors.opened(file_of(place)) as file:
            return _adapters(Source(file, sites, table), unwanted)

    return arguments.read(path, read, FILE)


def file_of(place: Path) -> Path:
    """Return the file that a path means, which may be that of its folder."""
    return place / FILE if place.is_dir() else place


def _adapters(source: Source, unwanted: Sequence[re.Pattern[str]]) -> Adapters:
    """Return the adapters of a file that is open."""
    modules = _modules(source, unwanted)
    said = Metadata.read(source.file)
    _check_targets(source, modules, said, unwanted)
    found: Adapters = {
        **pieces.adapters(_piece(source, name, own, said) for name, own in modules.items())
    }
    if not found:
        raise ValueError(f"{source.where} has no adapters: got {len(source.file.shapes)} tensors")
    return pieces.placed(found, source.where)


def _modules(source: Source, unwanted: Sequence[re.Pattern[str]]) -> dict[str, dict[str, str]]:
    """Return the names of each module's tensors by what they are, in the order of the tree."""
    by_spelling = spellings.spelled(source.table)
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    spelled: dict[str, str] = {}
    for tensor in source.file.shapes:
        if arguments.is_among(tensor, unwanted):
            continue
        spelling, kind = keys.parsed(tensor, source.where)
        name = _meant(source, tensor, by_spelling.get(spelling, []), spelling, by_spelling)
        source.add(found[name], kind, tensor, name)
        if (other := spelled.setdefault(name, spelling)) != spelling:
            raise ValueError(
                f"{source.where} must spell {name!r} in one way: got {other!r} and {spelling!r}"
            )
    return dict(found)


def _meant(
    source: Source, tensor: str, own: Sequence[str], spelling: str, known: Mapping[str, object]
) -> str:
    """Return the one name that a tensor is of, or raise where there is none or are several."""
    if not own:
        raise ValueError(
            f"the tensor {tensor!r} of {source.where} has no place, and ignore does not name it: "
            f"{missing(spelling, known)}"
        )
    if len(own) > 1:
        raise ValueError(
            f"the tensor {tensor!r} of {source.where} must be of one module: its name is a "
            f"spelling of {' and '.join(map(repr, own))}"
        )
    return own[0]


def _check_targets(
    source: Source,
    modules: Mapping[str, Tensors],
    said: Metadata,
    unwanted: Sequence[re.Pattern[str]],
) -> None:
    """Raise if the modules that have tensors are not those that the metadata name."""
    ignored = {
        spellings.split(tensor)[0]
        for tensor in source.file.shapes
        if arguments.is_among(tensor, unwanted)
    }
    for config in said.configs():
        told = {name: said.of(name) for name in source.table}
        own = {name: short for name, (found, short) in told.items() if found is config}
        is_whole = ignored.isdisjoint(spellings.split(name)[0] for name in own)
        if "target_modules" in config.values and own and is_whole:
            short = {short: source.table[name] for name, short in own.items()}
            adapted = [own[name] for name in modules if name in own]
            targets.check(Source(source.file, source.sites, short), config, adapted)


def _piece(source: Source, name: str, own: Mapping[str, str], said: Metadata) -> Piece:
    """Return the factors of a module."""
    first = next(iter(own.values()))
    place = source.place(name, first)
    how = factors.adaptable(source, place, first)
    found = factors.read(source, own, place, how)
    magnitude = None
    if (tensor := own.get("magnitude")) is not None:
        if tensor.endswith(keys.NORMS):
            _check_outer(source, tensor, found.b.size // found.rank)
        magnitude = factors.magnitude(source, tensor, place, how.roles)
    alpha = found.alpha(_alpha(source, name, own, found.form_rank, said))
    box, _ = source.box(place)
    whole = source.whole(place)
    return Piece(place.path, box, how.roles, whole, alpha, found.a, found.b, magnitude)


def _check_outer(source: Source, tensor: str, out: int) -> None:
    """Raise if norms are not those of the rows of a weight, as PyTorch has it."""
    shape = source.file.shapes[tensor]
    if shape[:1] != (out,):
        raise ValueError(
            f"the tensor {tensor!r} of {source.where} must have the norms of the {out} outputs "
            f"along its first axis: got {shape}; norms of inputs, which LyCORIS has with "
            "wd_on_output=False, are no DoRA"
        )


def _alpha(source: Source, name: str, own: Mapping[str, str], rank: int, said: Metadata) -> float:
    """Return the alpha of a module, for the rank that its tensors have in the file."""
    config, module = said.of(name)
    if "alpha" not in own:
        if config is None:
            return rank
        config.check(module, rank, "magnitude" in own, source.where)
        return config.plain_alpha(module, rank)
    tensor = own["alpha"]
    if config is not None:
        raise ValueError(
            f"{source.where} must tell alpha once: got {tensor!r} and the metadata {METADATA!r}"
        )
    if source.file.shapes[tensor] not in ((), (1,)):
        raise ValueError(
            f"the tensor {tensor!r} of {source.where} must be one number: got the shape "
            f"{source.file.shapes[tensor]}"
        )
    alpha = float(source.file[tensor].reshape(()))
    if not np.isfinite(alpha) or alpha < 0:
        raise ValueError(
            f"the tensor {tensor!r} of {source.where} must be finite and not negative: got {alpha}"
        )
    return alpha or rank
