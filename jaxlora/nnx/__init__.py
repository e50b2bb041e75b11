"""Adapters for a Flax NNX module, in the form NNX has for everything: a module.

`Adapted` holds a module as it is and beside it the factors, variables of a type of their own.
NNX then does the rest by type: `flax.nnx.Optimizer` and `flax.nnx.grad` with ``wrt=Factor``
train the factors alone, `flax.nnx.jit` compiles, `flax.nnx.split` parts. A call runs the module
through `jaxlora.lora` and writes back what the module changed of itself: statistics, counts of
random streams, caches, what it sowed.

The rest of the library does not import this file, so that ``import jaxlora`` leaves Flax alone:
write ``import jaxlora.nnx``.
"""

from jaxlora.nnx.adapted import Adapted, Factor, adapt, merge

__all__ = ["Adapted", "Factor", "adapt", "merge"]
