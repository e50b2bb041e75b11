"""A folder of PEFT that is open, and the tree that it is read for."""

import collections
import dataclasses

from jaxlora.formats.peft.config import Config
from jaxlora.formats.peft.keys import SHARED, Key, parse_all
from jaxlora.formats.source import Source

ModuleKey = tuple[str, int]  # its name, and in how many adapted ones it stands


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """A folder that is being read.

    Attributes:
        config: its config.
    """

    config: Config

    def keys(self) -> tuple[dict[ModuleKey, dict[str, str]], list[Key], list[Key]]:
        """Return the names of each module's factors by kind, the values, and rows of tokens."""
        modules: dict[ModuleKey, dict[str, str]] = collections.defaultdict(dict)
        others: dict[str, list[Key]] = {"value": [], "tokens": []}
        shared = SHARED if self.config.kind == "VERA" else ()
        for key in parse_all(self.file.shapes, self.where, shared):
            if key.kind in others:
                others[key.kind].append(key)
                continue
            known = modules[key.module, key.depth].setdefault(key.kind, key.name)
            if known != key.name:
                raise ValueError(
                    f"{self.where} has two tensors {key.kind} of {key.module!r}: {known!r} and "
                    f"{key.name!r}"
                )
        return modules, others["value"], others["tokens"]
