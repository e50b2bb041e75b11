"""What of a program to adapt: the weights that it uses, a user's wishes, and what these choose."""

from jaxlora.targets.sites import Site, Sites

__all__ = ["Site", "Sites"]
