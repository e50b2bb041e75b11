"""What becomes of adapted weights: the program is evaluated with them, and each use written down.

The evaluation is abstract: nothing is computed.
"""

import dataclasses
from typing import Any

import jax

from jaxlora.messages import checks, table
from jaxlora.tracing.evaluator import Evaluator
from jaxlora.tracing.jaxprs import cost
from jaxlora.tracing.jaxprs.cost import Cost
from jaxlora.tracing.options import Options
from jaxlora.tracing.program import trace, with_trained
from jaxlora.tracing.recorder import Kind, Recorder, Use
from jaxlora.types import Function, PyTree
from jaxlora.weights import tree_checks
from jaxlora.weights.nodes import LoRAWeight

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Report:
    """What becomes of each adapted weight of a program.

    Attributes:
        uses: the operations that consume it, by path.
        costs: extra operations and bytes of one call by path, a loop of unknown length counted
            once; what several weights share is divided evenly among them.
    """

    uses: dict[str, tuple[Use, ...]]
    costs: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """The extra operations and bytes in all."""
        return sum(self.costs.values(), Cost())

    @property
    def materialized(self) -> dict[str, tuple[Use, ...]]:
        """The uses at which a weight is made dense, by path."""
        found = {
            path: tuple(use for use in uses if use.kind == Kind.MATERIALIZED)
            for path, uses in self.uses.items()
        }
        return {path: uses for path, uses in found.items() if uses}

    def __str__(self) -> str:
        rows = []
        for path, uses in self.uses.items():
            low = [_told(use) for use in uses if use.kind != Kind.MATERIALIZED]
            dense = [
                f"{u.operation} at {u.source}: {u.reason}" for u in self.materialized.get(path, ())
            ]
            low = list(dict.fromkeys(low)) or ["" if dense else "not used"]
            cost = self.costs[path]
            cells = (", ".join(low), f"{cost.flops:,}", f"{cost.bytes:,}", "; ".join(dense))
            rows.append((path, *cells))
        header = ("path", "low-rank at", "extra FLOPs", "extra bytes", "materialized at")
        body = table.render_folded(header, rows)
        return f"{body}\n\nextra {self.cost.flops:,} FLOPs, {self.cost.bytes:,} bytes"

    __repr__ = __str__


def _told(use: Use) -> str:
    is_made = use.form == "weight-side"
    form = f", {use.form} in training: {use.why}" if is_made else ""
    sharing = f", input shared by {use.sharing}" if use.sharing > 1 else ""
    return f"{use.operation} ({use.kind}{form}{sharing})"


def explain(
    fn: Function, params: PyTree, /, *args: Any, platform: str | None = None, **kwargs: Any
) -> Report:
    """Tell for each adapted weight where the program takes it low-rank, and where not and why.

    Args:
        fn: any function; its first argument is ``params``.
        params: its parameters with adapted weights; arrays or shapes.
        *args: its other arguments.
        platform: what it is compiled for, ``"cpu"``, ``"gpu"`` or ``"tpu"``, for the forms of the
            products; default JAX's own.
        **kwargs: its keyword arguments.

    Returns:
        The uses of every adapted weight, and what it costs beyond the plain program.

    Raises:
        ValueError: no leaf of params is adapted, or there is no such platform.
        TypeError: fn is no function, or params no tree of arrays.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> print(jaxlora.explain(model, params, x))
    path  low-rank at               extra FLOPs  extra bytes  materialized at
    ----  ------------------------  -----------  -----------  ---------------
    w     dot_general (contracted)  37           200
    <BLANKLINE>
    extra 37 FLOPs, 200 bytes
    """
    order = "explain(fn, params, *args)"
    checks.check_function(fn, order)
    leaves = tree_checks.check_tree(params, order)
    adapted = [path for path, leaf in leaves.items() if isinstance(leaf, LoRAWeight)]
    if not adapted:
        raise ValueError("params has no adapted weight: make some with jaxlora.init")
    platform = jax.default_backend() if platform is None else platform
    checks.check_choice(platform, "platform", PLATFORMS)
    recorder = Recorder()
    evaluator = Evaluator(Options(platform=platform), recorder)
    program = trace(fn, *with_trained(((params, *args), kwargs)))

    def run(*inputs):
        return program.evaluated(evaluator, inputs)

    counted = cost.count(jax.make_jaxpr(run)(*program.inputs))
    uses: dict[str, list[Use]] = {path: [] for path in adapted}
    for use in recorder.uses:
        uses.setdefault(use.path, []).append(use)
    costs = dict.fromkeys(uses, Cost())
    for weights, number in recorder.numbers.items():
        for path in weights:
            costs[path] += counted.get(number, Cost()).shared(len(weights))
    return Report({path: tuple(found) for path, found in uses.items()}, costs)
