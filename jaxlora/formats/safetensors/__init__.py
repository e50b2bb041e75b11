"""Checkpoints of Hugging Face: weights in files of safetensors, into a tree and from one."""

from jaxlora.formats.safetensors.reading import load
from jaxlora.formats.safetensors.writing import save

__all__ = ["load", "save"]
