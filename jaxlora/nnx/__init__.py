"""Adapters for a Flax NNX module, in the form NNX has for everything: a module.

`Adapted` holds a copy of a module and beside it the factors, the only variables in it of type
`flax.nnx.Param`, and of its subclass `flax.nnx.LoRAParam`. NNX and what is written for it then do
the rest by type: `flax.nnx.Optimizer` and `flax.nnx.grad` train the factors alone,
`flax.nnx.split` separates them, trainers for LoRA find them. The parameters of the module are
`Frozen` variables. A call runs the module through `jaxlora.lora` and writes back what the module
changed of itself: statistics, counts of random streams, caches, what it sowed.

The rest of the library does not import this file, so that ``import jaxlora`` leaves Flax alone. It
is imported where ``jaxlora.nnx`` is first used.
"""

from jaxlora.nnx.adapted import Adapted, Factor, adapt, merge
from jaxlora.nnx.frozen import Frozen

__all__ = ["Adapted", "Factor", "Frozen", "adapt", "merge"]
