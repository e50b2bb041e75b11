"""PEFT of Hugging Face: its folders, and its names for what `jaxlora.algebra` has objects for."""

from jaxlora.formats.peft.combining import CombinationType, MajoritySignMethod, combine
from jaxlora.formats.peft.reading import load
from jaxlora.formats.peft.writing import save

__all__ = ["CombinationType", "MajoritySignMethod", "combine", "load", "save"]
