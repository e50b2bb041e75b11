"""Every difference between JAX versions, and every use of what JAX does not promise to keep.

From 0.10 to 0.12 `ClosedJaxpr` was folded into `Jaxpr`, and `scan` carries `ft_in` in place of
``num_consts`` and ``num_carry``. Primitives are known by name, because the objects move.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

JIT = ("jit", "pjit")
REMAT = ("checkpoint", "remat", "remat2")

Literal = core.Literal
_JAX = os.path.dirname(jax.__file__) + os.sep


def consts(jaxpr: Any) -> Sequence[Any]:
    """Return the constants of a jaxpr; an open one has none."""
    return getattr(jaxpr, "consts", ())


def opened(jaxpr: Any) -> Any:
    """Return the jaxpr without its constants, where a version parts the two."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Run one equation on these values, and return its outputs as a list."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


@contextlib.contextmanager
def scope(eqn: Any) -> Iterator[None]:
    """Run what stands inside under the name scope, the source line and the settings of eqn."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=stack),
        eqn.ctx.manager,
    ):
        yield


def where(eqn: Any) -> tuple[str, str]:
    """Return the operation and the user's line of an equation, empty where it is unknown.

    None is the end of the program.
    """
    if eqn is None:
        return "output", "the end of the program"
    line = source_info_util.summarize(eqn.source_info)
    return eqn.primitive.name, line


def is_of_jax(program: Any) -> bool:
    """Tell whether a program is that of a function of JAX itself, which it traces once for all."""
    source = getattr(program.debug_info, "func_filename", None) or ""
    return source.startswith(_JAX)


def file_and_number(line: str) -> tuple[str, int]:
    """Return the file and the number of a line from `where`."""
    found = re.match(r"(.*?):(\d+)", line)
    return (found[1], int(found[2])) if found else ("<program>", 1)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Return the programs among the parameters of an equation."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
    return [v for v in values if hasattr(opened(v), "eqns")]


def varying(x: Any) -> frozenset:
    """Return the axes of a mesh over which an array is known to vary, inside of `shard_map`."""
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return the number of constants and of carried values of a scan."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    return num_consts, num_carry
