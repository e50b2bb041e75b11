"""What other libraries call things: their names and layouts, read and written here alone."""

from jaxlora.formats import diffusion, peft, safetensors
from jaxlora.formats.names import Names, Place

__all__ = ["Names", "Place", "diffusion", "peft", "safetensors"]
