"""Where adapters can go: the program is evaluated once with a probe in the place of each leaf.

The evaluation is abstract: nothing is computed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import paths, table, tracing
from jaxlora.tracing import boundary
from jaxlora.weight import Roles


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
    dtype: Any
    roles: Roles
    uses: tuple[tracing.Use, ...]

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
    def is_lookup(self) -> bool:
        """Whether rows of it are looked up and it is never contracted."""
        return all(use.kind != tracing.CONTRACTED for use in self.uses)


@dataclasses.dataclass(frozen=True)
class Sites:
    """A table of what can be adapted, in the order of the tree; iterate it or index it by path.

    Attributes:
        sites: the sites by path.
        skipped: for each other leaf, why it is no site.
        shapes: shape of every leaf.
    """

    sites: dict[str, Site]
    skipped: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, path: object) -> bool:
        return path in self.sites

    def __getitem__(self, path: str) -> Site:
        if path not in self.sites:
            near = paths.nearest(path, self.sites)
            raise KeyError(f"no site {path!r}: {self.skipped.get(path, 'no such leaf')}; {near}")
        return self.sites[path]

    def __str__(self):
        rows = []
        for path, shape in self.shapes.items():
            if path in self.sites:
                site = self.sites[path]
                used = ", ".join(sorted({f"{use.operation}" for use in site.uses}))
                cells = (str(site.stack), str(site.in_), str(site.out), used)
            else:
                cells = ("", "", "", f"no site: {self.skipped[path]}")
            rows.append((path, str(shape), *cells))
        return table.render_folded(("path", "shape", "stack", "in", "out", "used by"), rows)

    __repr__ = __str__


def find_sites(fn: Callable[..., Any], params: Any, /, *args: Any, **kwargs: Any) -> Sites:
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
    leaves, treedef = paths.flatten(params)
    if not leaves:
        raise ValueError("params is an empty tree: it must hold the weights of the program")
    leaves = {path: _plain(leaf) for path, leaf in leaves.items()}
    params = treedef.unflatten(leaves.values())
    unfit = {path: why for path, leaf in leaves.items() if (why := _unfit(leaf))}
    recorder = tracing.Recorder()
    evaluator = tracing.Evaluator(recorder=recorder)
    program = tracing.trace(fn, (params, *args), kwargs)
    fit = [path for path, leaf in leaves.items() if tracing.is_array(leaf)]

    def run(*arrays):
        values = list(arrays)
        for i, path in enumerate(fit):
            if path not in unfit:
                values[i] = boundary.probe(path, values[i])
        return [*map(evaluator.left, evaluator.run(program.jaxpr, *values))]

    jax.eval_shape(run, *program.inputs)
    uses: dict[str, list[tracing.Use]] = {path: [] for path in leaves}
    for use in recorder.uses:
        uses[use.path].append(use)
    sites, skipped = {}, dict(unfit)
    for path, leaf in leaves.items():
        if path in unfit:
            continue
        supported = tuple(use for use in uses[path] if use.kind != tracing.MATERIALIZED)
        roles = _roles(supported, leaf.ndim)
        if roles is None:
            skipped[path] = _why(uses[path])
        else:
            sites[path] = Site(path, tuple(leaf.shape), leaf.dtype, roles, supported)
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    return Sites(sites, skipped, shapes)


def _plain(leaf: Any) -> Any:
    return paths.abstract(paths.plain(leaf))


def _unfit(leaf: Any) -> str | None:
    """Return why a leaf cannot be adapted whatever the program does with it."""
    if not tracing.is_array(leaf):
        return f"it is no array but {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"its dtype is {leaf.dtype}, not floating"
    if 0 in leaf.shape:
        return "it has an axis of size 0"
    return None


def _roles(uses: tuple[tracing.Use, ...], ndim: int) -> Roles | None:
    """Return the roles of the use that decides: a lookup before a product.

    What is looked up along axes that are a stack in a product, as entries of experts beside those
    that are multiplied, leaves it to the product.
    """
    stacks = [use.stack for use in uses if use.kind == tracing.CONTRACTED]
    lookups = [use for use in uses if use.kind == tracing.LOOKED_UP]
    first = [use for use in lookups if not any(use.in_ <= stack for stack in stacks)]
    for use in (*first, *(use for use in uses if use.kind == tracing.CONTRACTED), *lookups):
        if found := _roles_of(use, ndim):
            return found
    return None


def _roles_of(use: tracing.Use, ndim: int) -> Roles | None:
    every = frozenset(range(ndim))
    in_ = use.in_ & every
    out = (use.out & every) - in_
    stack = (use.stack & every) - in_ - out
    rest = every - stack - in_ - out  # axes of size 1, which no operation shows
    if use.kind == tracing.LOOKED_UP and len(in_) > 1 and not out:  # single elements
        out = frozenset({max(in_)})
        in_ -= out
    if in_ and not out:
        out = rest
    else:
        in_ |= rest
    if not in_ or not (out or use.kind == tracing.CONTRACTED):
        return None
    return Roles(*(tuple(sorted(axes)) for axes in (stack, in_, out)))


def _why(uses: list[tracing.Use]) -> str:
    if not uses:
        return "the program does not use it"
    return "reaches " + ", ".join(sorted({use.operation for use in uses}))
