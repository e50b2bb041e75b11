"""What other libraries call things: their names and layouts, read and written here alone."""

from jaxlora.formats import diffusion, models, names, peft, safetensors
from jaxlora.formats.names import Names, Place

__all__ = ["Names", "Place", "diffusion", "models", "names", "peft", "safetensors"]
