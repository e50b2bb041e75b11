"""The file ``adapter_config.json`` of a PEFT folder: what it says, and which modules it means."""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from jaxlora.messages import checks

T = TypeVar("T")
CONFIG_FILE = "adapter_config.json"

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
        "task_type",
        *("fan_in_fan_out", "peft_type"),  # the layouts of `Names` say the first
    }
)
_CHANGES_BASE = re.compile(r"(pissa(_niter_\d+)?|olora|corda|lora_ga|loftq)")


def _numbers(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf
        for v in value.values()
    )


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _indices(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "r": (lambda x: type(x) is int and x > 0, "an int above 0"),
        "lora_alpha": (lambda x: _numbers({"": x}), "a number above 0"),
        "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
        "use_dora": (lambda x: isinstance(x, bool), "true or false"),
        "bias": (lambda x: x in ("none", "all", "lora_only"), '"none", "all" or "lora_only"'),
        "target_modules": (lambda x: isinstance(x, str) or _strings(x), "a string or strings"),
        "exclude_modules": (lambda x: isinstance(x, str) or _strings(x), "a string or strings"),
        "target_parameters": (_strings, "strings"),
        "modules_to_save": (_strings, "strings"),
        "layers_to_transform": (lambda x: type(x) is int or _indices(x), "an index or indices"),
        "layers_pattern": (lambda x: isinstance(x, str) or _strings(x), "a string or strings"),
        "rank_pattern": (_numbers, "numbers above 0 by name"),
        "alpha_pattern": (_numbers, "numbers above 0 by name"),
        "trainable_token_indices": (
            lambda x: _indices(x) or (isinstance(x, dict) and all(map(_indices, x.values()))),
            "indices, or indices by name",
        ),
        "init_lora_weights": (lambda x: isinstance(x, bool | str), "true, false or a name"),
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a config says.

    Attributes:
        path: the file.
        values: what it says of each key that has a meaning here, where it says anything.
        version: the version of PEFT that wrote it, empty if it does not tell.
    """

    path: Path
    values: Mapping[str, Any]
    version: tuple[int, ...]

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
        return alpha * math.sqrt(rank) if self.get("use_rslora") else alpha


def named(module: str, names: str | Iterable[str]) -> bool:
    """Tell whether one of some names, or one regular expression, means a module."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return not {*suffixes(module)}.isdisjoint(names)


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
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must be an object of JSON: got {checks.shown(found)}")
    kind = found.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{str(path)!r} must have the peft_type 'LORA': got {checks.shown(kind)}")
    values = {k: v for k, v in found.items() if v is not None and _has_meaning(path, k, v)}
    _check_start(path, values.get("init_lora_weights"))
    _check_expressions(path, values)
    return Config(path, values, _version(found.get("peft_version")))


def _has_meaning(path: Path, key: str, value: Any) -> bool:
    """Tell whether a key has a meaning here, or raise if it has one that is not known."""
    if key in _KINDS:
        fits, needed = _KINDS[key]
        if not fits(value):
            raise ValueError(f"{key} of {str(path)!r} must be {needed}: got {checks.shown(value)}")
        return True
    if value in (False, "", [], {}, 0):
        return False
    if key in _UNKNOWN_MATHEMATICS:
        raise ValueError(
            f"{str(path)!r} sets {key}, which this library does not have: "
            f"{_UNKNOWN_MATHEMATICS[key]}; got {checks.shown(value)}"
        )
    if key not in _WITHOUT_EFFECT:
        raise ValueError(
            f"{str(path)!r} sets {key}, which is not known: it may change what the adapter "
            f"computes; got {checks.shown(value)}"
        )
    return False


def _check_start(path: Path, start: object) -> None:
    """Raise if an adapter is of a base that its start has changed."""
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start):
        raise ValueError(
            f"the adapter of {str(path)!r} started with {start!r}, which changed the base: save it "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
            "makes it an adapter of the base as it was"
        )


def _check_expressions(path: Path, values: Mapping[str, Any]) -> None:
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
                f"{str(path)!r} has {expression!r}, which is no regular expression: {error}"
            ) from error


def _version(text: object) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text) if isinstance(text, str) else None
    return tuple(map(int, found[0].split("."))) if found else ()


def plain(modules: Iterable[tuple[str, int, float]]) -> dict[str, Any]:
    """Return a config of plain keys for modules, each with its rank and alpha."""
    modules = [*modules]
    rank = _most_common([rank for _, rank, _ in modules])
    alpha = _most_common([alpha for _, _, alpha in modules])
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [name for name, _, _ in modules],
        "rank_pattern": {_pinned(name): r for name, r, _ in modules if r != rank},
        "alpha_pattern": {_pinned(name): _number(a) for name, _, a in modules if a != alpha},
    }


def _most_common(values: list[T]) -> T:
    return collections.Counter(values).most_common(1)[0][0]


def _number(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _pinned(module: str) -> str:
    return "^" + re.escape(module)
