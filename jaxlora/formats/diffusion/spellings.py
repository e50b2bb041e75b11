"""How files spell the name of a module.

A name is as diffusers has it, the component of the pipeline first: ``"unet.mid_block.conv"``.
kohya's scripts write dots as underscores behind a prefix for the component, so a name is never
taken apart: those that the tree has are spelled, and looked up.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

# What stands for a component before a name with underscores, and before one with dots.
_UNDERSCORED = MappingProxyType(
    {
        "unet": ("lora_unet_",),
        "transformer": ("lora_unet_", "lora_transformer_"),
        "text_encoder": ("lora_te_", "lora_te1_"),
        "text_encoder_2": ("lora_te2_",),
        "text_encoder_3": ("lora_te3_",),
    }
)
_DOTTED = MappingProxyType({name: ("diffusion_model.",) for name in ("unet", "transformer")})


def split(name: str) -> tuple[str, str]:
    """Return the component of a name and what is behind it; none of a name without a dot."""
    component, dot, rest = name.partition(".")
    return (component, rest) if dot else ("", name)


def spelled(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that each spelling stands for; of most it is one."""
    found: dict[str, list[str]] = {}
    for name in names:
        for spelling in _spellings(name):
            found.setdefault(spelling, []).append(name)
    return found


def of_kohya(names: Iterable[str]) -> Mapping[str, str]:
    """Return how kohya's scripts spell each name.

    Raises:
        ValueError: they spell two names alike.
    """
    names = [*names]
    components = {split(name)[0] for name in names}
    is_first = not components.isdisjoint(("text_encoder_2", "text_encoder_3", "transformer"))
    found: dict[str, str] = {}
    for name in names:
        component, rest = split(name)
        prefixes = _UNDERSCORED.get(component, (f"lora_{component}_" if component else "lora_",))
        prefix = prefixes[-1 if component == "text_encoder" and is_first else 0]
        spelling = prefix + rest.replace(".", "_")
        if (known := found.setdefault(spelling, name)) != name:
            raise ValueError(
                f"kohya's names have underscores for dots, and two are {spelling!r}: {known!r} "
                f"and {name!r}"
            )
    return {name: spelling for spelling, name in found.items()}


def _spellings(name: str) -> set[str]:
    component, rest = split(name)
    flat = rest.replace(".", "_")
    default = (f"lora_{component}_" if component else "lora_",)
    dotted = {prefix + rest for prefix in _DOTTED.get(component, ())}
    underscored = {prefix + flat for prefix in (*_UNDERSCORED.get(component, default), "lycoris_")}
    return {name} | dotted | underscored
