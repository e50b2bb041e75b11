"""What the header of a file says of its adapters: the configs of diffusers."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping

from jaxlora.formats.diffusion import spellings
from jaxlora.formats.peft import config as configs
from jaxlora.formats.peft.config import Config
from jaxlora.formats.tensors import TensorFile
from jaxlora.types import Json

METADATA = "lora_adapter_metadata"
# what such files have no tensors for
_OTHERS = ("bias", "modules_to_save", "target_parameters", "trainable_token_indices")
_NOTHING = ("none", [], {})


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The configs that diffusers writes, perhaps none.

    Attributes:
        by_component: what is said of each component, under ``""`` of a file with only one.
    """

    by_component: Mapping[str, Config]

    @classmethod
    def read(cls, file: TensorFile) -> "Metadata":
        """Return what a file says.

        Raises:
            ValueError: it is not what diffusers writes, or says what adapters here cannot.
        """
        if METADATA not in file.metadata:
            return cls({})
        where = f"{METADATA} of {str(file.path)!r}"
        said = configs.json_object(file.metadata[METADATA], where)
        by_component: dict[str, Json] = collections.defaultdict(dict)
        for name, value in said.items():
            component, key = spellings.split(name)
            by_component[component][key] = value
        return cls({name: _config(values, where) for name, values in by_component.items()})

    def configs(self) -> Iterable[Config]:
        """Return all configs."""
        return self.by_component.values()

    def of(self, name: str) -> tuple[Config | None, str]:
        """Return what is said of a module, perhaps nothing, and its name there."""
        component, rest = spellings.split(name)
        if component in self.by_component:
            return self.by_component[component], rest
        return self.by_component.get(""), name


def _config(values: Json, where: str) -> Config:
    """Return what is said of a component, or raise where it says more than of LoRA's factors."""
    config = configs.from_values({"peft_type": "LORA"} | values, where)
    others = {key: config.get(key) for key in _OTHERS if config.get(key, "none") not in _NOTHING}
    if config.kind != "LORA" or others:
        raise ValueError(
            f"{where} must be of LoRA's factors alone: got the peft_type {config.kind!r} and "
            f"{others or 'no other'}"
        )
    return config


def packed(by_component: Mapping[str, Json]) -> str:
    """Return configs of components as one text; the opposite of `Metadata.read`."""
    flat = {
        f"{component}.{key}" if component else key: value
        for component, config in by_component.items()
        for key, value in config.items()
    }
    return json.dumps(flat, indent=2, sort_keys=True)
