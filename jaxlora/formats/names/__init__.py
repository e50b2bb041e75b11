"""Which name of a file stands for which place in a tree of parameters."""

from jaxlora.formats.names.finding import find
from jaxlora.formats.names.mapping import Names as Names
from jaxlora.formats.names.mapping import Place as Place

__all__ = ["find"]
