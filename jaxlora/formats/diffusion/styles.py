"""Modules with factors as tensors and a header, in the styles of diffusers and kohya's scripts."""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxlora.formats import streaming
from jaxlora.formats.diffusion import spellings
from jaxlora.formats.diffusion.metadata import METADATA, packed
from jaxlora.formats.modules import Module, arranged, norms
from jaxlora.formats.peft import plain
from jaxlora.targets.sites import Sites
from jaxlora.types import Json

_Named = Iterator[tuple[str, np.ndarray]]
Contents = tuple[dict[str, np.ndarray], dict[str, str]]  # tensors and header, by name


def diffusers(found: list[Module], names: Sequence[str], sites: Sites | None) -> Contents:
    """Return what diffusers writes.

    Args:
        found: the modules.
        names: all names that the tree has, as far as they are known.
        sites: where adapters can go, if it is known.
    """
    return dict(_of_diffusers(found, sites)), {METADATA: packed(_configs(found, names))}


def kohya(found: list[Module], names: Sequence[str], sites: Sites | None) -> Contents:
    """Return what kohya's scripts write, and LyCORIS for magnitudes; see `diffusers`."""
    written = [module.name for module in found]
    if not names and any(name.startswith("text_encoder") for name in written):
        raise ValueError(
            "kohya's name of a text encoder depends on what else the pipeline has: give "
            "sites=jaxlora.find_sites(fn, params, *args)"
        )
    spelling = spellings.of_kohya(written, names or written)
    made = dict(_of_kohya(found, spelling, sites))
    return made, _said_by_kohya(found, made)


def _of_diffusers(found: list[Module], sites: Sites | None) -> _Named:
    """Return the tensors of modules by name."""
    for module in found:
        first, second = module.tensors(arranged(module, sites))
        yield f"{module.name}.lora_A.weight", first
        yield f"{module.name}.lora_B.weight", second
        if (magnitude := norms(module, first)) is not None:
            yield f"{module.name}.lora_magnitude_vector", magnitude


def _configs(found: list[Module], names: Sequence[str]) -> dict[str, Json]:
    """Return the config of each component."""
    by_component = collections.defaultdict(list)
    for module in found:
        component, _ = spellings.split(module.name)
        by_component[component].append(module)
    made = {}
    for component, own in by_component.items():
        short = [dataclasses.replace(m, name=spellings.split(m.name)[1]) for m in own]
        others = [rest for first, rest in map(spellings.split, names) if first == component]
        made[component] = plain.config(short) | plain.excluded(short, others)
    return made


def _of_kohya(found: list[Module], spelling: Mapping[str, str], sites: Sites | None) -> _Named:
    """Return the tensors of modules by name."""
    for module in found:
        name = spelling[module.name]
        first, second = module.tensors(arranged(module, sites))
        yield f"{name}.lora_down.weight", first
        yield f"{name}.lora_up.weight", second
        yield f"{name}.alpha", _exactly(module.alpha)
        if (magnitude := module.magnitude()) is not None:
            yield f"{name}.dora_scale", magnitude.reshape(-1, *(1 for _ in first.shape[1:]))


def _exactly(alpha: float) -> np.ndarray:
    """Return a number as a tensor, float32 as kohya's scripts have it where that can hold it."""
    return np.array(alpha, np.float32 if float(np.float32(alpha)) == alpha else np.float64)


def _said_by_kohya(found: list[Module], made: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return what the header says: the method, rank and alpha, and a hash of the tensors."""
    has_magnitude = any(module.first.magnitude is not None for module in found)
    ranks, alphas = ({getattr(m, what) for m in found} for what in ("rank", "alpha"))
    said = {"ss_network_module": "lycoris.kohya" if has_magnitude else "networks.lora"}
    if has_magnitude:
        said["ss_network_args"] = json.dumps({"algo": "lora", "dora_wd": "True"})
    for name, values in {"ss_network_dim": ranks, "ss_network_alpha": alphas}.items():
        said[name] = f"{values.pop():g}" if len(values) == 1 else "Dynamic"
    said["sshs_model_hash"] = streaming.digest(made)
    return said
