"""What the tensors of a file are called: one grammar of endings for all that write such files."""

import re
from types import MappingProxyType

NORMS = ".dora_scale"  # behind the name of magnitudes of LyCORIS
# What of a module a tensor is, by what stands behind the module's name.
_ENDINGS = MappingProxyType(
    {
        **{f".{name}.weight": "A" for name in ("lora_A", "lora_down", "lora.down")},
        **{f".{name}.weight": "B" for name in ("lora_B", "lora_up", "lora.up")},
        ".lora_linear_layer.down.weight": "A",
        ".lora_linear_layer.up.weight": "B",
        ".lora_mid.weight": "core",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        NORMS: "magnitude",
        ".alpha": "alpha",
        **{f".hada_{kind}": kind for kind in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    }
)
# the attention of early versions of diffusers: "attn1.processor.to_q_lora.down.weight"
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_[a-z]+)_lora\.(down|up)\.weight")
_SIDES = MappingProxyType({"down": "A", "up": "B"})

_REFUSED = MappingProxyType(
    {
        r".*\.lokr_.*": "LoKr is a product of Kronecker, which two factors of a small rank are not",
        r".*\.diff(_b)?": "it is the difference of a whole weight or bias",
        r".*\.set_weight": "it replaces a weight",
        r".*\.(w|b)_norm": "it is the difference of the weight of a normalization",
        r".*\.lora_(B|up)\.bias": "B has a bias",
        r".*\.oft_.*": "OFT rotates a weight",
        r".*\.(a1|a2|b1|b2)\.weight": "GLoRA multiplies a weight",
    }
)


def parse(name: str) -> tuple[str, str] | None:
    """Return the module of a tensor as the file spells it, and what of it the tensor is.

    Returns:
        None where the name tells nothing.
    """
    if found := _PROCESSOR.fullmatch(name):
        owner, projection, side = found.groups()
        # the output is the first of a list in the module
        module = f"{owner}.{projection}" + (".0" if projection == "to_out" else "")
        return module, _SIDES[side]
    ending = next((end for end in _ENDINGS if name.endswith(end)), None)
    return None if ending is None else (name.removesuffix(ending), _ENDINGS[ending])


def parsed(name: str, where: str) -> tuple[str, str]:
    """Return what `parse` does, or raise for what is not understood."""
    if found := parse(name):
        return found
    why = next((why for form, why in _REFUSED.items() if re.fullmatch(form, name)), None)
    raise ValueError(
        f"the tensor {name!r} of {where} is not understood, and would be lost: "
        + (f"{why}; merge it with what made it" if why else f"names end in one of {(*_ENDINGS,)}")
    )
