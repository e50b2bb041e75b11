"""What the variables of a program stand for, and when each is read for the last time."""

from collections.abc import Hashable, Sequence

from jaxlora.tracing.jaxprs import compat
from jaxlora.tracing.jaxprs.compat import Atom, Eqn, Jaxpr, Literal, Var


def values(program: Jaxpr) -> dict[Atom, Atom]:
    """Return what the variables of a program stand for, for those that select between them.

    Two that stand for one have equal values and equal derivatives: a variable and what stops its
    gradient stand for two.

    Returns:
        By variable the first that is computed in the same way; a selection between one variable
        and itself counts as that variable.
    """
    if all(eqn.primitive.name != "select_n" for eqn in program.eqns):
        return {}
    found: dict[Atom, Atom] = {}
    first: dict[Hashable, Var] = {}
    for eqn in program.eqns:
        has_literal = any(isinstance(atom, Literal) for atom in eqn.invars)
        if has_literal or eqn.effects or compat.inner_jaxprs(eqn):
            continue
        name = eqn.primitive.name
        inputs = [found.get(atom, atom) for atom in eqn.invars]
        if name == "select_n" and len({*inputs[1:]}) == 1:
            found[eqn.outvars[0]] = inputs[1]
            continue
        for i, var in enumerate(eqn.outvars):
            found[var] = first.setdefault((i, name, str(eqn.params), *inputs), var)
    return found


def varying(program: Jaxpr) -> dict[Atom, tuple[int, ...]]:
    """Return for the predicates that a program selects by along which dimensions each varies."""
    selected_by = [eqn.invars[0] for eqn in program.eqns if eqn.primitive.name == "select_n"]
    if not selected_by:
        return {}
    makers = {var: eqn for eqn in program.eqns for var in eqn.outvars}
    found = {}
    for which in selected_by:
        if isinstance(which, Literal):
            continue
        maker = makers.get(which)
        found[which] = tuple(range(len(compat.shape(which))))
        if maker is not None and maker.primitive.name == "broadcast_in_dim":
            kept = zip(
                maker.params["broadcast_dimensions"], compat.shape(maker.invars[0]), strict=True
            )
            found[which] = tuple(d for d, size in kept if size != 1)
    return found


def last_uses(eqns: Sequence[Eqn], outvars: Sequence[Atom]) -> dict[Eqn, list[Var]]:
    """Return by equation the variables that no later one reads, and that are no outputs."""
    kept = {atom for atom in outvars if not isinstance(atom, Literal)}
    last: dict[Var, Eqn] = {}
    for eqn in eqns:
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, Literal) and atom not in kept:
                last[atom] = eqn
    by_eqn: dict[Eqn, list[Var]] = {}
    for var, eqn in last.items():
        by_eqn.setdefault(eqn, []).append(var)
    return by_eqn
