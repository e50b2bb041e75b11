"""Where adapters can go: the program is evaluated once with a probe in the place of each leaf.

The evaluation is abstract: nothing is computed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlora.messages import checks, table
from jaxlora.tracing.evaluator import Evaluator
from jaxlora.tracing.interpreter import evaluate
from jaxlora.tracing.program import is_array, trace
from jaxlora.tracing.recorder import Kind, Recorder, Use
from jaxlora.tracing.values.probe import Probe
from jaxlora.types import Function, Leaf, PyTree
from jaxlora.weights import paths, tree_checks
from jaxlora.weights.roles import Roles

UNUSED, RETURNED = "the program does not use it", "the program returns it and consumes it nowhere"
_ADDITIONS = frozenset({"add", "add_any", "sub"})


@dataclasses.dataclass(frozen=True)
class Site:
    """One adaptable weight.

    Attributes:
        path: path of the leaf.
        shape: its shape.
        dtype: its dtype.
        roles: the role of each axis.
        uses: the operations that consume it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    roles: Roles
    uses: tuple[Use, ...]

    @property
    def stack(self) -> tuple[int, ...]:
        """Axes along which the weight is a stack of weights."""
        return self.roles.stack

    @property
    def in_(self) -> tuple[int, ...]:
        """Axes that the program contracts or looks up along."""
        return self.roles.in_

    @property
    def out(self) -> tuple[int, ...]:
        """Axes left in the result."""
        return self.roles.out

    @property
    def max_rank(self) -> int:
        """The smaller side; a rank above it adds nothing."""
        return self.roles.max_rank(self.shape)

    @property
    def is_looked_up(self) -> bool:
        """Whether rows of it are looked up anywhere, as in an embedding that is also the head.

        An entry of a stack that is picked by an index, as an expert, is no row.
        """
        rows = (use.in_ - {*self.roles.stack} for use in self.uses if use.kind == Kind.LOOKED_UP)
        return any(rows)


@dataclasses.dataclass(frozen=True)
class Sites:
    """A table of what can be adapted, in the order of the tree; iterate it or index it by path.

    Attributes:
        sites: the sites by path.
        skipped: for each other leaf, why it is no site.
        shapes: shape of every leaf.
        dense: those of the other leaves that can be adapted by name, and run dense: weights of two
            or more axes that reach operations without a low-rank rule alone. The axes that a loop
            runs over are their stack, the last of the others is out, and the rest are in. They are
            indexed by path as the sites are, but not among them.
    """

    sites: dict[str, Site]
    skipped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dense: dict[str, Site] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, path: object) -> bool:
        return (path.path if isinstance(path, Site) else path) in self.sites

    def __getitem__(self, path: str) -> Site:
        found = self.sites | self.dense
        if path not in found:
            near = paths.nearest(path, self.sites)
            raise KeyError(f"no site {path!r}: {self.skipped.get(path, 'no such leaf')}; {near}")
        return found[path]

    def __str__(self) -> str:
        rows = []
        for path, shape in self.shapes.items():
            if path in self.sites:
                site = self.sites[path]
                used = ", ".join(sorted({f"{use.operation}" for use in site.uses}))
                cells = (str(site.stack), str(site.in_), str(site.out), used)
            else:
                by_name = "; by name it runs dense" if path in self.dense else ""
                cells = ("", "", "", f"no site: {self.skipped[path]}{by_name}")
            rows.append((path, str(shape), *cells))
        return table.render_folded(("path", "shape", "stack", "in", "out", "used by"), rows)

    __repr__ = __str__


def check_sites(sites: object, *, may_be_none: bool = False) -> None:
    """Raise if these are no sites."""
    if not isinstance(sites, Sites) and not (may_be_none and sites is None):
        or_none = ", or None" if may_be_none else ""
        raise TypeError(
            f"sites must be from jaxlora.find_sites{or_none}: got {checks.shown(sites)}"
        )


def find_sites(fn: Function, params: PyTree, /, *args: Any, **kwargs: Any) -> Sites:
    """Find every weight that can be adapted, by tracing the program that uses it.

    Args:
        fn: any function; its first argument is ``params``.
        params: its parameters, arrays or `jax.ShapeDtypeStruct`.
        *args: its other arguments, arrays or shapes.
        **kwargs: its keyword arguments.

    Returns:
        The sites, and for every other leaf why it is none.

    Raises:
        ValueError: the tree is empty, or two leaves have the same path.
        TypeError: fn is no function, or params no tree of arrays.

    >>> import jax.numpy as jnp, jaxlora
    >>> def model(params, x):
    ...     return x @ params["w"] + params["bias"]
    >>> params = {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    >>> print(jaxlora.find_sites(model, params, jnp.ones((2, 4))))
    path  shape   stack  in    out   used by
    ----  ------  -----  ----  ----  --------------------
    bias  (3,)                       no site: reaches add
    w     (4, 3)  ()     (0,)  (1,)  dot_general
    """
    order = "find_sites(fn, params, *args)"
    checks.check_function(fn, order)
    tree_checks.check_tree(params, order)
    leaves, treedef = paths.flatten(params)
    leaves = {path: _plain(leaf) for path, leaf in leaves.items()}
    params = treedef.unflatten(leaves.values())
    unfit = {path: why for path, leaf in leaves.items() if (why := _unfit(leaf))}
    recorder = Recorder()
    evaluator = Evaluator(recorder=recorder)
    program = trace(fn, (params, *args), kwargs)
    fit = [path for path, leaf in leaves.items() if is_array(leaf)]

    returned: set[str] = set()

    def run(*arrays):
        values = list(arrays)
        for i, path in enumerate(fit):
            if path not in unfit:
                values[i] = Probe.enter(path, values[i])
        outs = [*map(evaluator.leave, evaluate(evaluator, program.jaxpr, *values))]
        returned.update(*(out.origin.paths for out in outs if isinstance(out, Probe)))
        return outs

    jax.eval_shape(run, *program.inputs)
    uses: dict[str, list[Use]] = {path: [] for path in leaves}
    for use in recorder.uses:
        uses[use.path].append(use)
    sites, skipped, dense, states = {}, dict(unfit), {}, paths.states(params)
    for path, leaf in leaves.items():
        if path in unfit:
            continue
        shape = tuple(leaf.shape)
        supported = tuple(use for use in uses[path] if use.kind != Kind.MATERIALIZED)
        if (roles := _roles(supported, leaf.ndim)) is not None:
            sites[path] = Site(path, shape, leaf.dtype, roles, supported)
            continue
        skipped[path] = _why(uses[path], path in returned)
        if path in states:
            continue
        if (roles := _dense_roles(path, uses[path], shape)) is not None:
            dense[path] = Site(path, shape, leaf.dtype, roles, tuple(uses[path]))
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    return Sites(sites, skipped, shapes, dense)


def _plain(leaf: Leaf) -> Leaf:
    return paths.abstract(paths.plain(leaf))


def _unfit(leaf: Leaf) -> str | None:
    """Return why a leaf cannot be adapted whatever the program does with it."""
    if not is_array(leaf):
        return f"it is no array but {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}, not floating"
    if 0 in leaf.shape:
        return "it has an axis of size 0"
    return None


def _roles(uses: tuple[Use, ...], ndim: int) -> Roles | None:
    """Return the roles of the use that decides: a lookup before a product.

    What is looked up along axes that are a stack in a product, as entries of experts beside those
    that are multiplied, leaves it to the product.
    """
    stacks = [use.stack for use in uses if use.kind == Kind.CONTRACTED]
    lookups = [use for use in uses if use.kind == Kind.LOOKED_UP]
    first = [use for use in lookups if not any(use.in_ <= stack for stack in stacks)]
    for use in (*first, *(use for use in uses if use.kind == Kind.CONTRACTED), *lookups):
        if found := _roles_of(use, ndim):
            return found
    return None


def _roles_of(use: Use, ndim: int) -> Roles | None:
    every = frozenset(range(ndim))
    in_ = use.in_ & every
    out = (use.out & every) - in_
    stack = (use.stack & every) - in_ - out
    rest = every - stack - in_ - out  # axes of size 1, which no operation shows
    if use.kind == Kind.LOOKED_UP and len(in_) > 1 and not out:  # single elements
        out = frozenset({max(in_)})
        in_ -= out
    if in_ and not out:
        out = rest
    else:
        in_ |= rest
    if not in_ or not (out or use.kind == Kind.CONTRACTED):
        return None
    return Roles(*(tuple(sorted(axes)) for axes in (stack, in_, out)))


def _dense_roles(path: str, uses: list[Use], shape: tuple[int, ...]) -> Roles | None:
    """Return the roles of a weight that no rule consumes, None where it is a vector or a bias."""
    operations = {use.operation for use in uses}
    called_bias = is_bias(path) or "bias" in path.lower()
    if not operations or (called_bias and operations <= _ADDITIONS):
        return None
    stack = frozenset().union(*(use.stack for use in uses))
    rest = [axis for axis in range(len(shape)) if axis not in stack]
    if not is_matrix([shape[axis] for axis in rest]):
        return None
    return Roles(tuple(sorted(stack)), tuple(rest[:-1]), tuple(rest[-1:]))


def is_bias(path: str) -> bool:
    """Tell whether a leaf is called a bias: its name is ``bias`` or ``b``."""
    return path.rpartition("/")[2] in ("bias", "b")


def is_matrix(sizes: Sequence[int]) -> bool:
    """Tell whether an array has two or more axes, those of size 1 not counted."""
    return sum(size > 1 for size in sizes) >= 2


def _why(uses: list[Use], is_returned: bool) -> str:
    if not uses:
        return RETURNED if is_returned else UNUSED
    return "reaches " + ", ".join(sorted({use.operation for use in uses}))
