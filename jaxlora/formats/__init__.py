"""What other libraries call things: their names and layouts, read and written here alone."""

from jaxlora.formats import peft

__all__ = ["peft"]
