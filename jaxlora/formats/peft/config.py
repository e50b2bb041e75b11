"""The file ``adapter_config.json`` of a PEFT folder: what it says, and which modules it means."""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlora.formats.peft import config_keys
from jaxlora.messages import checks
from jaxlora.types import Json

CONFIG_FILE = "adapter_config.json"
TYPES = ("LORA", "LOHA", "ADALORA", "VERA")
_CHANGES_BASE = re.compile(r"(pissa(_niter_\d+)?|olora|corda|lora_ga|loftq)")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config says.

    Attributes:
        where: what it is in, as errors name it.
        kind: its ``peft_type``, one of `TYPES`.
        values: what it says of each key that has a meaning here, where it says anything, in the
            words of LoRA's configs.
        version: the version of PEFT that wrote it, empty if it does not tell.
        divisor: what alpha is divided by, None for the rank of each module.
        is_transposed: whether the weights of linear layers lie as those of ``Conv1D`` of GPT-2.
    """

    where: str
    kind: str
    values: Mapping[str, Any]
    version: tuple[int, ...]
    divisor: float | None = None
    is_transposed: bool = False

    def get(self, key: str, default: Any = None) -> Any:
        """Return what it says of a key."""
        return self.values.get(key, default)

    def means(self, module: str) -> bool:
        """Tell whether a module is one of its targets."""
        saved = self.get("modules_to_save", ())
        is_within = any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved)
        if is_within or named(module, self.get("exclude_modules", ())):
            return False
        return named(module, self.get("target_modules", ())) and self._is_in_layers(module)

    def saved(self, module: str) -> set[str]:
        """Return which of the modules to save a module is, or is within: its name ends so."""
        parts = module.split(".")
        owners = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        names = self.get("modules_to_save", ())
        return {name for name in names if any(owner.endswith(name) for owner in owners)}

    def _is_in_layers(self, module: str) -> bool:
        """Tell whether a module is in one of the layers that are adapted, as PEFT finds them."""
        layers, targets = self.get("layers_to_transform"), self.get("target_modules")
        if layers in (None, []) or isinstance(targets, str) or module in targets:
            return True
        patterns = self.get("layers_pattern") or ()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns]
        for expression in expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
            if found := re.match(expression, module):
                return int(found["index"]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def rank(self, module: str) -> int:
        """Return the rank that it gives a module."""
        return _of_pattern(module, self.get("rank_pattern"), self.get("r", 8))

    def plain_alpha(self, module: str, rank: int) -> float:
        """Return the alpha of a plain LoRA that scales as it says for a module and rank."""
        alpha = float(_of_pattern(module, self.get("alpha_pattern"), self.get("lora_alpha", 8)))
        if self.divisor is not None:
            return alpha * rank / self.divisor
        return alpha * math.sqrt(rank) if self.get("use_rslora") else alpha

    def check(self, module: str, rank: int, has_magnitude: bool, where: str) -> None:
        """Raise if the factors of a module in a file are none that it speaks of."""
        if rank != self.rank(module):
            raise ValueError(
                f"the rank of {module!r} must be {self.rank(module)}, as its config says: got "
                f"{rank} in {where}"
            )
        if has_magnitude != self.get("use_dora", False):
            raise ValueError(
                f"use_dora of a config must say whether there are magnitudes: got "
                f"{self.get('use_dora', False)}, and {where} has "
                f"{'one' if has_magnitude else 'none'} for {module!r}"
            )


def named(module: str, names: str | Collection[str]) -> bool:
    """Tell whether one of some names, or one regular expression, means a module."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return bool(names) and not {*suffixes(module)}.isdisjoint(names)


def suffixes(module: str) -> Iterator[str]:
    """Return a module's name, and what is left of it without its first parts."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _of_pattern(module: str, pattern: Mapping[str, Any] | None, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read(folder: Path) -> Config:
    """Return what the config of a folder says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no config, or says what adapters of this library cannot.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}: {str(folder)!r} must be "
            "a folder that PEFT saved an adapter to"
        )
    where = repr(str(path))
    return from_values(json_object(path.read_bytes(), where), where)


def json_object(text: str | bytes, where: str) -> Json:
    """Return an object of JSON, or raise for what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object of JSON: got {checks.shown(found)}")
    return found


def from_values(found: Mapping[str, Any], where: str) -> Config:
    """Return what a config says, see `read`."""
    kind = found.get("peft_type")
    if kind not in TYPES:
        raise ValueError(f"{where} must have a peft_type among {TYPES}: got {checks.shown(kind)}")
    values = config_keys.with_meaning(found, where)
    _check_start(where, values.get("init_lora_weights"))
    _check_expressions(where, values)
    values, divisor = _as_of_lora(kind, values)
    version = _version(found.get("peft_version"))
    return Config(where, kind, values, version, divisor, found.get("fan_in_fan_out") is True)


def _as_of_lora(kind: str, values: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the values of any type of adapter in LoRA's words, and what divides alpha."""
    match kind:
        case "LOHA":
            return values | {"lora_alpha": values.get("alpha", 8)}, None
        case "ADALORA":  # neither the rank that is left of a module nor a pattern scales it
            kept = values.get("rank_pattern", {})
            rank = values.get("init_r", 12)
            ranks = {
                pinned(name.rpartition(".lora_E")[0]): sum(
                    choices if isinstance(choices, list) else [choices]
                )
                for name, choices in kept.items()
            }
            own = {key: value for key, value in values.items() if key != "alpha_pattern"}
            return own | {"r": rank, "rank_pattern": ranks}, rank + 1e-5
        case "VERA":
            only = {"bias": "lora_only"} if values.get("bias") == "vera_only" else {}
            return {"r": 256} | values | only | {"lora_alpha": 1}, 1.0
    return values, None


def _check_start(where: str, start: object) -> None:
    """Raise if an adapter is of a base that its start has changed."""
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start):
        raise ValueError(
            f"the adapter of {where} started with {start!r}, which changed the base: save it "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
            "makes it an adapter of the base as it was"
        )


def _check_expressions(where: str, values: Mapping[str, Any]) -> None:
    """Raise for a key that is no regular expression where one is needed."""
    expressions: list[str] = [*values.get("rank_pattern", ()), *values.get("alpha_pattern", ())]
    expressions += [*values.get("modules_to_save", ())]
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        expressions += [values[key]] if isinstance(values.get(key), str) else []
    patterns = values.get("layers_pattern", ())
    expressions += [] if isinstance(patterns, str) else patterns
    for expression in expressions:
        try:
            re.compile(rf"({expression})")
        except re.error as error:
            raise ValueError(
                f"{where} has {expression!r}, which is no regular expression: {error}"
            ) from error


def _version(text: object) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text) if isinstance(text, str) else None
    return tuple(map(int, found[0].split("."))) if found else ()


def pinned(module: str) -> str:
    """Return the pattern that means one module alone."""
    return "^" + re.escape(module)
