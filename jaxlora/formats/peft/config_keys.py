"""The keys of PEFT's configs: what each must be, and which change what an adapter computes."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxlora.messages import checks

# Keys that change what an adapter computes, and that adapters of this library cannot say.
_UNKNOWN_MATHEMATICS = MappingProxyType(
    {
        "alora_invocation_tokens": "aLoRA applies it from a token on",
        "arrow_config": "Arrow chooses among adapters for each token",
        "kasa_config": "KaSA changes the base",
        "layer_replication": "it repeats layers of the base",
        "lora_bias": "B has a bias",
        "megatron_config": "it is for Megatron's parallel layers",
        "monteclora_config": "MonteCLoRA draws factors",
        "use_bdlora": "BD-LoRA has factors of blocks",
        "use_qalora": "QA-LoRA sums groups of inputs",
        "velora_config": "VeLoRA compresses what its gradients need",
    }
)
# Keys that only say how an adapter was made or is trained, or whose it is.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying"),
        *("eva_config", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
        *("fan_in_fan_out", "peft_type", "task_type"),  # the layouts of `Names` say the first
        *("init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"),  # of LoHa
        *("beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit"),  # AdaLoRA
        *("total_step", "d_initial", "projection_prng_key", "save_projection", "vera_dropout"),
    }
)


def _numbers(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf
        for v in value.values()
    )


def _choices(value: object) -> bool:
    """Tell whether a value has for names which of their ranks are kept, as AdaLoRA does."""
    return isinstance(value, Mapping) and all(
        isinstance(v, list) and all(isinstance(x, bool) for x in v) for v in value.values()
    )


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _indices(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


_BIASES = ("none", "all", "lora_only", "vera_only")
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "r": (lambda x: type(x) is int and x > 0, "an int above 0"),
        "lora_alpha": (lambda x: _numbers({"": x}), "a number above 0"),
        "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
        "use_dora": (lambda x: isinstance(x, bool), "true or false"),
        "alpha": (lambda x: _numbers({"": x}), "a number above 0"),  # of LoHa
        "init_r": (lambda x: type(x) is int and x > 0, "an int above 0"),  # of AdaLoRA
        "bias": (_BIASES.__contains__, '"none", "all" or "lora_only"'),
        "target_modules": (lambda x: isinstance(x, str) or _strings(x), "a string or strings"),
        "exclude_modules": (lambda x: isinstance(x, str) or _strings(x), "a string or strings"),
        "target_parameters": (_strings, "strings"),
        "modules_to_save": (_strings, "strings"),
        "layers_to_transform": (lambda x: type(x) is int or _indices(x), "an index or indices"),
        "layers_pattern": (lambda x: isinstance(x, str) or _strings(x), "a string or strings"),
        "rank_pattern": (lambda x: _numbers(x) or _choices(x), "numbers above 0 by name"),
        "alpha_pattern": (_numbers, "numbers above 0 by name"),
        "trainable_token_indices": (
            lambda x: _indices(x) or (isinstance(x, dict) and all(map(_indices, x.values()))),
            "indices, or indices by name",
        ),
        "init_lora_weights": (lambda x: isinstance(x, bool | str), "true, false or a name"),
    }
)


# What any type of adapter may say of its base and its task; others have names for themselves alone.
_OF_ALL_TYPES = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode"),
        *("revision", "task_type"),
    }
)
# What a config that is written says anew of its factors; how they started is no part of them.
_REWRITTEN = frozenset({*_KINDS, "peft_type", "peft_version"} - {"init_lora_weights"})


def beside_factors(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says that holds for other factors of LoRA in the place of its own."""
    if found["peft_type"] == "LORA":
        return {key: value for key, value in found.items() if key not in _REWRITTEN}
    return {key: value for key, value in found.items() if key in _OF_ALL_TYPES}


def with_meaning(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a config says of the keys that have a meaning here.

    Raises:
        ValueError: a value is none that its key can have, or a key changes what is computed in a
            way that is not known.
    """
    return {k: v for k, v in found.items() if v is not None and _has_meaning(where, k, v)}


def _has_meaning(where: str, key: str, value: Any) -> bool:
    """Tell whether a key has a meaning here, or raise if it has one that is not known."""
    if key in _KINDS:
        fits, needed = _KINDS[key]
        if not fits(value):
            raise ValueError(f"{key} of {where} must be {needed}: got {checks.shown(value)}")
        return True
    if value in (False, "", [], {}, 0):
        return False
    if key in _UNKNOWN_MATHEMATICS:
        raise ValueError(
            f"{where} sets {key}, which this library does not have: "
            f"{_UNKNOWN_MATHEMATICS[key]}; got {checks.shown(value)}"
        )
    if key not in _WITHOUT_EFFECT:
        raise ValueError(
            f"{where} sets {key}, which is not known: it may change what the adapter "
            f"computes; got {checks.shown(value)}"
        )
    return False
