"""Every difference between JAX versions, and every use of what JAX does not promise to keep.

From 0.10 to 0.12 `ClosedJaxpr` was folded into `Jaxpr`, and `scan` carries `ft_in` in place of
``num_consts`` and ``num_carry``. Primitives are known by name, because the objects move.
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core, source_info_util
from jax.extend.core import Jaxpr, Literal, Var
from jax.interpreters import partial_eval

JIT = ("jit", "pjit")
REMAT = ("checkpoint", "remat", "remat2")

Eqn = core.JaxprEqn
Atom = Var | Literal
Traced = Any  # a Jaxpr, or what was a ClosedJaxpr before 0.12, which exports no such type
Params = Mapping[str, Any]  # of an equation
Scope = Any  # one of the name scopes of an equation
_JAX = os.path.dirname(jax.__file__) + os.sep


def consts(jaxpr: Traced) -> Sequence[jax.Array]:
    """Return the constants of a jaxpr; an open one has none."""
    return getattr(jaxpr, "consts", ())


def opened(jaxpr: Traced) -> Jaxpr:
    """Return the jaxpr without its constants, where a version splits the two."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def shape(atom: Atom) -> tuple[int, ...]:
    """Return the shape of an input or an output of an equation."""
    return getattr(atom.aval, "shape", ())


def size(atom: Atom) -> int:
    """Return the number of elements of an input or an output of an equation."""
    return math.prod(shape(atom))


def dtype(atom: Atom) -> np.dtype | None:
    """Return the dtype of an input or an output of an equation, None for what is no array."""
    return getattr(atom.aval, "dtype", None)


def nbytes(atom: Atom) -> int:
    """Return the bytes of an input or an output of an equation, none for what is no array."""
    found = dtype(atom)
    return 0 if found is None else size(atom) * found.itemsize


def read(atom: Atom, env: Mapping[Atom, Any]) -> Any:
    """Return the value of a literal, or what a variable stands for."""
    return atom.val if isinstance(atom, Literal) else env[atom]


def bind(eqn: Eqn, values: Sequence[jax.Array]) -> list[jax.Array]:
    """Run one equation on these values, and return its outputs as a list."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def scopes(eqn: Eqn) -> tuple[Scope, ...]:
    """Return the name scopes that an equation stands in, outermost first."""
    return eqn.source_info.name_stack.stack


def stands_within(eqn: Eqn, outer: Eqn) -> bool:
    """Tell whether an equation stands in all name scopes that another stands in."""
    return scopes(eqn)[: len(scopes(outer))] == scopes(outer)


def common_scopes(eqns: Sequence[Eqn]) -> tuple[Scope, ...]:
    """Return the name scopes that all of some equations stand in."""
    levels = zip(*map(scopes, eqns), strict=False)
    alike = itertools.takewhile(lambda level: len({*level}) == 1, levels)
    return tuple(level[0] for level in alike)


@contextlib.contextmanager
def scope(which: slice, *eqns: Eqn) -> Iterator[None]:
    """Run what stands inside under name scopes, source line and settings of the first equation.

    Args:
        which: of the name scopes, outermost first.
        *eqns: the equations; settings are those that all of them have.
    """
    first = eqns[0]
    own = source_info_util.NameStack(scopes(first)[which])
    stack = source_info_util.current_name_stack() + own
    is_common = all(eqn.ctx == first.ctx for eqn in eqns)
    with (
        source_info_util.user_context(first.source_info.traceback, name_stack=stack),
        first.ctx.manager if is_common else contextlib.nullcontext(),
    ):
        yield


def unscoped(program: Jaxpr) -> tuple[Jaxpr, contextlib.AbstractContextManager[None]]:
    """Return a program without the name scopes that all of it stands in, and a context with them.

    Flax names a layer inside of what is rematerialized, so that layers differ by their names.
    """
    common = common_scopes(program.eqns)
    eqns = []
    for eqn in program.eqns:
        inner = source_info_util.NameStack(scopes(eqn)[len(common) :])
        eqns.append(eqn.replace(source_info=eqn.source_info.replace(name_stack=inner)))
    outer = source_info_util.current_name_stack() + source_info_util.NameStack(common)
    return program.replace(eqns=eqns), source_info_util.set_name_stack(outer)


def where(eqn: Eqn | None) -> tuple[str, str]:
    """Return the operation and the user's line of an equation, empty where it is unknown.

    None is the end of the program.
    """
    if eqn is None:
        return "output", "the end of the program"
    line = source_info_util.summarize(eqn.source_info)
    return eqn.primitive.name, line


def is_of_jax(program: Jaxpr) -> bool:
    """Tell whether a program is that of a function of JAX itself, which it traces once for all."""
    source = getattr(program.debug_info, "func_filename", None) or ""
    return source.startswith(_JAX)


def file_and_number(line: str) -> tuple[str, int]:
    """Return the file and the number of a line from `where`."""
    found = re.match(r"(.*?):(\d+)", line)
    return (found[1], int(found[2])) if found else ("<program>", 1)


def inner_jaxprs(eqn: Eqn) -> list[Traced]:
    """Return the programs among the parameters of an equation."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
    return [*filter(is_program, values)]


def is_program(value: object) -> bool:
    """Tell whether a parameter of an equation is a program."""
    return hasattr(opened(value), "eqns")


def is_staged() -> bool:
    """Tell whether operations become part of a program now, and do not run at once."""
    return core.unsafe_am_i_under_a_jit_DO_NOT_USE()  # pyright: ignore[reportPrivateImportUsage]


def alive(jaxpr: Traced) -> Jaxpr:
    """Return a program without the equations that its outputs do not need."""
    program = opened(jaxpr)
    kept, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return kept


def varying(x: object) -> frozenset[str]:
    """Return the axes of a mesh over which an array is known to vary, inside of `shard_map`."""
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def scan_counts(params: Params) -> tuple[int, int]:
    """Return the number of constants and of carried values of a scan."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    return num_consts, num_carry
