"""Where in a program the low-rank term of a product is added to it.

A product is often split into heads: `dot_general`, perhaps a bias, and then a `reshape`. A compiler
can fold that reshape into the product, and choose for it the layout that the attention reads. It
cannot where the sum with the low-rank term stands between the two: on TPU the result was copied
into another layout, and the attention read its logits once more. So the term is reshaped by itself,
and added after.
"""

from collections import Counter
from collections.abc import Sequence

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Jaxpr, Var


def splits(program: Jaxpr) -> dict[Eqn, Eqn]:
    """Return by product the reshape that splits the last dimension of its result, if one does.

    Between the two there are only sums, and each result on the way has one reader.
    """
    if all(eqn.primitive.name != "reshape" for eqn in program.eqns):
        return {}
    reads = Counter(atom for atom in _read(program) if isinstance(atom, Var))
    found: dict[Atom, Eqn] = {}  # by variable the reshape that splits it

    def read_once(atoms):
        return [atom for atom in atoms if isinstance(atom, Var) and reads[atom] == 1]

    by_product: dict[Eqn, Eqn] = {}
    for eqn in reversed(program.eqns):
        split = found.get(eqn.outvars[0]) if len(eqn.outvars) == 1 else None
        if eqn.primitive.name == "reshape" and _splits_last(eqn):
            found |= dict.fromkeys(read_once(eqn.invars), eqn)
        elif eqn.primitive.name == "add" and split is not None:
            shape = compat.shape(eqn.outvars[0])
            whole = [atom for atom in eqn.invars if compat.shape(atom) == shape]
            found |= dict.fromkeys(read_once(whole), split)
        elif eqn.primitive.name == "dot_general" and split is not None:
            by_product[eqn] = split
    return by_product


def _read(program: Jaxpr) -> Sequence[Atom]:
    return [*(atom for eqn in program.eqns for atom in eqn.invars), *program.outvars]


def _splits_last(eqn: Eqn) -> bool:
    """Tell whether a reshape cuts the last dimension, and keeps all others."""
    if len(eqn.invars) != 1 or eqn.params.get("dimensions") is not None:
        return False
    before, after = compat.shape(eqn.invars[0]), compat.shape(eqn.outvars[0])
    kept = len(before) - 1
    return 0 < len(before) < len(after) and before[:kept] == after[:kept]
