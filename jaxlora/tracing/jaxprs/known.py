"""What is known of a program before it is run."""

from collections.abc import Callable, Collection, Iterator, Sequence

from jaxlora.tracing import registry
from jaxlora.tracing.jaxprs import compat, dataflow, layers, sharing, sums
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Jaxpr, Var
from jaxlora.tracing.jaxprs.keys import Keys, Part


class Known:
    """What is known of a program.

    Attributes:
        is_of_jax: whether it is that of a function of JAX itself.
        plan: the products that read one input, see `sharing.Plan`.
        values: what the variables stand for, see `dataflow.values`.
        varying: along which dimensions predicates vary, see `dataflow.varying`.
        splits: by product what splits its result, after which its term is added, see `sums.splits`.
        alone: equations that are not run together with others: those reshapes.
        keys: what is equal of its parts.
        whole: all of it.
    """

    def __init__(self, program: Jaxpr):
        self.is_of_jax = compat.is_of_jax(program)
        self.plan = sharing.plan(program)
        self.values, self.varying = dataflow.values(program), dataflow.varying(program)
        self.splits = sums.splits(program)
        self.alone = frozenset(split.reshape for split in self.splits.values())
        self.keys = Keys(self.values, self.varying)
        self.whole = Part.whole(program, self.plan.eqns)
        self._last_uses = dataflow.last_uses(self.plan.eqns, program.outvars)

    def gone(self, eqns: Sequence[Eqn]) -> set[Var]:
        """Return the variables that nothing reads after some equations."""
        return {var for eqn in eqns for var in self._last_uses.get(eqn, ())}

    def part(self, eqns: Sequence[Eqn]) -> Part:
        """Return equations as a part of it."""
        return Part.of(eqns, self.gone(eqns))

    def pieces(self, part: Part, is_array: Callable[[Atom], bool]) -> list[layers.Piece]:
        """Cut a part into layers and what stands around them, see `layers.cut`.

        Args:
            part: the part.
            is_array: tells whether what an input of it stands for is an array.
        """
        return layers.cut(part.eqns, self.keys, self.part, self._together(part, is_array))

    def _together(self, part: Part, is_array: Callable[[Atom], bool]) -> Iterator[Collection[Eqn]]:
        """Yield products of one input and several weights, and products with what splits them."""
        for product, split in self.splits.items():
            yield product, split.reshape
        weights = {atom for atom in part.inputs if not is_array(atom)}
        for eqn in part.eqns:
            reads = any(atom in weights for atom in eqn.invars if isinstance(atom, Var))
            if reads and not registry.primitive(eqn).is_product:
                weights.update(eqn.outvars)
        for reader, group in self.plan.groups.items():
            if reader == group[0]:
                yield {one.eqn for one in group if one.other in weights}
