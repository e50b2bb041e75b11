"""What is looked at: the factors of each weight, and the weight itself where it is known."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxlora.linalg import matrices, meshes
from jaxlora.trees.binding import bind, split
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import blocks, paths, quantized, tree_checks
from jaxlora.weights.adapters import Adapter, Trained
from jaxlora.weights.fingerprints import Fingerprint
from jaxlora.weights.magnitude import merged
from jaxlora.weights.nodes import LoRAWeight

_INSTEAD = "use adapted.adapters() or adapted.params()"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """One adapter and what it is of; a pytree, of which `jax.jit` compiles each shape once.

    Attributes:
        adapter: the factors, of all of the weight.
        base: the weight, which may be a block of a leaf; None where it is not known.
    """

    adapter: Adapter
    base: Leaf | None

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Return ``a (*stack, in, rank)`` and ``b (*stack, rank, out)``, the scaling in ``b``."""
        a, b = matrices.factors_by_entry(self.adapter)
        return a, b * self.adapter.scaling

    def weight(self) -> jax.Array:
        """Return the weight ``(*stack, in, out)``."""
        return matrices.by_entry(quantized.values(self._known()), self.adapter.roles)

    def merged(self) -> jax.Array:
        """Return the weight in effect ``(*stack, in, out)``, with the magnitude if there is one."""
        node = LoRAWeight(self._known(), (self.adapter,))
        return matrices.by_entry(merged(node), self.adapter.roles)

    def _known(self) -> Leaf:
        assert self.base is not None
        return self.base


def is_adapters(given: object) -> bool:
    """Tell whether this is a dict of adapters by path."""
    if not isinstance(given, Mapping) or not given:
        return False
    return all(isinstance(value, Trained) for value in given.values())


def is_trained(given: object) -> bool:
    """Tell whether this is a dict of adapters by path, or a tree with adapted weights."""
    return is_adapters(given) or any(map(paths.is_trained, paths.flatten(given)[0].values()))


def read(
    given: PyTree, base: PyTree | None, call: str, name: str = "adapters"
) -> tuple[dict[str, Operand], tuple[str, ...]]:
    """Return what is to be looked at by path, and the names of what has no factors.

    Args:
        given: adapters by path, or where no base is given a tree with adapted weights.
        base: the plain tree that adapters are for, or None.
        call: the call, for errors.
        name: what given is called there.
    """
    if base is not None:
        adapters = given if is_adapters(given) else split(given)[1]
        tree_checks.check_adapters(adapters, name, some=True)
        given = bind(base, adapters)
    if is_adapters(given):
        terms = {path: (term, None) for path, term in given.items()}
    else:
        hint = f"{call} takes adapters alone, or a tree that holds them and all others"
        leaves, _ = tree_checks.flatten_adapted(given, _INSTEAD, hint)
        terms = {
            blocks.name(path, term.block): (term, leaf.base)
            for path, leaf in leaves.items()
            if paths.is_trained(leaf)
            for term in leaf.terms
        }
    found = {
        path: _operand(term, leaf)
        for path, (term, leaf) in terms.items()
        if isinstance(term, Adapter)
    }
    left_out = tuple(path for path in terms if path not in found)
    if not found:
        raise ValueError(f"{name} must hold factors: got {', '.join(left_out)}, trained itself")
    return found, left_out


def run(compute: Function, *operands: Operand, **static: object) -> Any:
    """Return what a function computes of operands, on a mesh of any kind; see `meshes.run`."""
    stack = len(operands[0].adapter.roles.stack)
    return meshes.run(compute, operands, stack=stack, **static)


def on_base(
    given: PyTree, base: PyTree, call: str, names: tuple[str, str] = ("adapters", "base")
) -> tuple[dict[str, Operand], tuple[str, ...]]:
    """Return what `read` does, of adapters whose base must be there."""
    leaves = tree_checks.check_tree(base, call, names[1])
    tree_checks.check_plain(leaves, call.partition("(")[0])
    return read(given, base, call, names[0])


def _operand(term: Adapter, leaf: Leaf | None) -> Operand:
    """Return an adapter as one of all of a weight, without what is known of the leaf it is for."""
    shape = blocks.shape(term.block, term.shape)
    base = None if leaf is None else quantized.part_of(leaf, term.block)
    whole = dataclasses.replace(term, block=None, shape=shape, fingerprint=Fingerprint())
    return Operand(whole, base)
