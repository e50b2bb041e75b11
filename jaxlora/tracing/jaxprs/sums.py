"""Where in a program the low-rank term of a product is added to it.

A product is often split into heads: `dot_general`, perhaps a bias, and then a `reshape`, or two
where heads share keys. A compiler can fold them into the product, and choose for it the layout that
the attention reads. It cannot where the sum with the low-rank term stands between them: on TPU the
result was copied into another layout, and the attention read its logits once more. So the term is
reshaped by itself, and added after the last.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Jaxpr, Var


class Split(NamedTuple):
    """What splits the last dimension of the result of a product.

    Attributes:
        reshape: the reshape that does, the last where several do one after the other.
        is_of_sum: something is added to the product before.
    """

    reshape: Eqn
    is_of_sum: bool


def splits(program: Jaxpr) -> dict[Eqn, Split]:
    """Return by product what splits the last dimension of its result, if something does.

    Between the two there are only sums and reshapes, and each result on the way has one reader.
    """
    if all(eqn.primitive.name != "reshape" for eqn in program.eqns):
        return {}
    reads = Counter(atom for atom in _read(program) if isinstance(atom, Var))
    found: dict[Atom, Split] = {}  # by variable what is done to it

    def read_once(atoms):
        return [atom for atom in atoms if isinstance(atom, Var) and reads[atom] == 1]

    by_product: dict[Eqn, Split] = {}
    for eqn in reversed(program.eqns):
        split = found.get(eqn.outvars[0]) if len(eqn.outvars) == 1 else None
        if eqn.primitive.name == "reshape" and _keeps_order(eqn):
            if split is None or not _splits_last(eqn.invars[0], split):
                split = Split(eqn, is_of_sum=False)
            found |= dict.fromkeys(read_once(eqn.invars), split)
        elif eqn.primitive.name == "add" and split is not None:
            shape = compat.shape(eqn.outvars[0])
            whole = [atom for atom in eqn.invars if compat.shape(atom) == shape]
            found |= dict.fromkeys(read_once(whole), split._replace(is_of_sum=True))
        elif eqn.primitive.name == "dot_general" and split and _splits_last(eqn.outvars[0], split):
            by_product[eqn] = split
    return by_product


def _read(program: Jaxpr) -> Sequence[Atom]:
    return [*(atom for eqn in program.eqns for atom in eqn.invars), *program.outvars]


def _keeps_order(reshape: Eqn) -> bool:
    return len(reshape.invars) == 1 and reshape.params.get("dimensions") is None


def _splits_last(atom: Atom, split: Split) -> bool:
    """Tell whether what is done to a value cuts its last dimension, and keeps all others."""
    before, after = compat.shape(atom), compat.shape(split.reshape.outvars[0])
    kept = len(before) - 1
    return 0 < len(before) < len(after) and before[:kept] == after[:kept]
