"""How files spell the name of a module.

A name is as diffusers has it, the component of the pipeline first: ``"unet.mid_block.conv"``.
kohya's scripts write dots as underscores behind a prefix for the component, so a name is never
taken apart: those that the tree has are spelled, and looked up.
"""

from collections.abc import Container, Iterable, Mapping
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
    names = [*names]
    has_third = any(split(name)[0] == "text_encoder_3" for name in names)
    found: dict[str, list[str]] = {}
    for name in names:
        for spelling in _spellings(name, is_last=not has_third):
            found.setdefault(spelling, []).append(name)
    return found


def of_kohya(written: Iterable[str], known: Iterable[str]) -> Mapping[str, str]:
    """Return how kohya's scripts spell each name.

    Args:
        written: the names.
        known: all names that the tree has.

    Raises:
        ValueError: they spell a name as another is spelled.
    """
    known = [*known]
    components = {split(name)[0] for name in known}
    meant = {name: _of_kohya(name, components) for name in written}
    names: dict[str, list[str]] = {}
    for name in known:
        names.setdefault(_of_kohya(name, components), []).append(name)
    for name, spelling in meant.items():
        if others := [other for other in names[spelling] if other != name]:
            raise ValueError(
                f"kohya's names have underscores for dots, and two are {spelling!r}: {name!r} and "
                f"{others[0]!r}"
            )
    return meant


def _of_kohya(name: str, components: Container[str]) -> str:
    """Return how kohya's scripts spell a name of a pipeline with some components."""
    component, rest = split(name)
    prefix = _prefixes(component)[0]
    others = ("text_encoder_2", "text_encoder_3", "transformer")
    if component == "text_encoder" and any(other in components for other in others):
        prefix = "lora_te1_"
    if component == "text_encoder_2" and "transformer" in components:  # the T5 of Flux
        prefix = "lora_te2_" if "text_encoder_3" in components else "lora_te3_"
    return prefix + rest.replace(".", "_")


def _prefixes(component: str) -> tuple[str, ...]:
    """Return what may stand for a component before a name with underscores."""
    return _UNDERSCORED.get(component, (f"lora_{component}_" if component else "lora_",))


def _spellings(name: str, *, is_last: bool) -> set[str]:
    component, rest = split(name)
    flat = rest.replace(".", "_")
    dotted = {prefix + rest for prefix in _DOTTED.get(component, ())}
    prefixes = [*_prefixes(component), "lycoris_"]
    if component == "text_encoder_2" and is_last:
        prefixes.append("lora_te3_")  # the T5 of Flux
    return {name} | dotted | {prefix + flat for prefix in prefixes}
