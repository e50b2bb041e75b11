"""Adapters of diffusion models in one file: of diffusers, kohya's scripts, LyCORIS and ComfyUI."""

from jaxlora.formats.diffusion.reading import load
from jaxlora.formats.diffusion.writing import Style, save

__all__ = ["Style", "load", "save"]
