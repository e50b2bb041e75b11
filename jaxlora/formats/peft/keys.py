"""What the tensors of a PEFT folder are called: the module, and what of it a tensor is."""

import dataclasses
import re
from collections.abc import Container, Iterable
from types import MappingProxyType

PREFIX = "base_model.model."

# What of a module a tensor is, by what stands behind the module's name.
_ENDINGS = MappingProxyType(
    {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_embedding_A": "A",
        ".lora_embedding_B": "B",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",  # before PEFT 0.12
        ".lora_E": "E",
        ".default_lora_latent_mapping.weight": "latent",  # LoRA-XS, which is no part of PEFT
        "_lora_latent_mapping.weight": "latent",  # so too, as PEFT shortens it
        ".lora_A": "A",  # of AdaLoRA
        ".lora_B": "B",
        **{f".hada_{kind}": kind for kind in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        **{f".vera_{kind}": kind for kind in ("lambda_b", "lambda_d")},
        ".token_adapter.trainable_tokens_delta": "tokens",
    }
)
_WRAPPERS = ("base_layer", "modules_to_save", "original_module")
_OURS = re.compile(r"lora_|hada_|vera_|token_adapter")
SHARED = ("base_model.vera_A", "base_model.vera_B")  # of all modules of VeRA


@dataclasses.dataclass(frozen=True)
class Key:
    """A tensor of a file.

    Attributes:
        name: its name in the file.
        module: the module, or for a tensor that replaces one of the base, that tensor.
        kind: ``"A"`` or another kind of `jaxlora.formats.factorizations`, ``"magnitude"``,
            ``"tokens"``, or ``"value"`` of what replaces.
        depth: in how many other adapted modules it stands, as one of several tensors of a module.
    """

    name: str
    module: str
    kind: str
    depth: int

    @property
    def is_of_base(self) -> bool:
        """Whether it is a tensor of the module beneath an adapted one."""
        return self.kind == "value" and self.depth > 0


def parse(name: str) -> Key | None:
    """Return what a tensor is, None where its name tells nothing."""
    if not name.startswith(PREFIX):
        return None
    rest = name.removeprefix(PREFIX)
    ending = next((end for end in _ENDINGS if rest.endswith(end)), None)
    kind = "value" if ending is None else _ENDINGS[ending]
    parts = rest.removesuffix(ending or "").split(".")
    module = ".".join(part for part in parts if part not in _WRAPPERS)
    if ending is None and any(map(_OURS.match, parts)):
        return None
    return Key(name, module, kind, parts.count("base_layer") + parts.count("original_module"))


def parse_all(names: Iterable[str], path: str, known: Container[str] = ()) -> list[Key]:
    """Return what the tensors of a file are, but for those that are known.

    Raises:
        ValueError: one is not understood.
    """
    found = {name: parse(name) for name in names if name not in known}
    if wrong := [name for name, key in found.items() if key is None]:
        raise ValueError(
            f"{path} has tensors that are not understood, which would be lost: "
            f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}; names start with "
            f"{PREFIX!r} and end in one of {tuple(_ENDINGS)}, or are those of the base"
        )
    return [key for key in found.values() if key is not None]
