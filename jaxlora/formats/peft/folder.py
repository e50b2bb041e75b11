"""A folder of PEFT that is open, and the tree that it is read for."""

import collections
import dataclasses
import functools

import numpy as np

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
            self.add(modules[key.module, key.depth], key.kind, key.name, key.module)
        return modules, others["value"], others["tokens"]

    @functools.cached_property
    def projections(self) -> tuple[np.ndarray, np.ndarray]:
        """The matrices that all modules of VeRA share, ``(rank, in)`` and ``(out, rank)``."""
        shapes = [self.file.shapes.get(name) for name in SHARED]
        if None in shapes:
            raise ValueError(
                f"{self.where} must have {SHARED}, which torch would draw again from a key: "
                "save it with save_projection=True in PEFT's VeraConfig"
            )
        first, second = (self.file[name] for name in SHARED)
        if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
            raise ValueError(
                f"{SHARED} of {self.where} must be (rank, in) and (out, rank): got {shapes}"
            )
        return first, second
