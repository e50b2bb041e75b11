"""How much is trained: parameters and bytes, per target and in all."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxlora.messages import checks, table
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import blocks, modules, paths, tree_checks
from jaxlora.weights.adapters import Adapter, Replacement
from jaxlora.weights.nodes import Node
from jaxlora.weights.quantized import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf.

    Attributes:
        path: its path.
        shape: its shape.
        rank: rank of its factors, 0 where it is not adapted.
        trainable: parameters in its factors, or in what is trained of it itself.
        total: parameters in it and its factors.
        trainable_bytes: bytes of its factors.
        total_bytes: bytes of it and its factors.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of what is trained and what is not; ``str`` folds repeated blocks.

    Attributes:
        rows: one for each leaf, in the order of the tree.
    """

    rows: tuple[Row, ...]

    @property
    def trainable(self) -> int:
        """Parameters in factors."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """Parameters in all, factors included."""
        return sum(row.total for row in self.rows)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the factors."""
        return sum(row.trainable_bytes for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """Bytes in all, factors included."""
        return sum(row.total_bytes for row in self.rows)

    def __str__(self) -> str:
        cells = [
            (
                row.path,
                str(row.shape),
                str(row.rank or ("itself" if row.trainable else "frozen")),
                f"{row.trainable:,}",
                f"{row.total:,}",
                f"{row.total_bytes:,}",
            )
            for row in self.rows
        ]
        body = table.render_folded(("path", "shape", "rank", "trainable", "total", "bytes"), cells)
        share = self.trainable / max(self.total, 1)
        return (
            f"{body}\n\ntrainable {self.trainable:,} of {self.total:,} parameters ({share:.2%}), "
            f"{self.trainable_bytes:,} of {self.total_bytes:,} bytes"
        )

    __repr__ = __str__


def summary(params: PyTree) -> Summary:
    """Count what is trained in a tree, and list what is left out.

    Args:
        params: a tree with `LoRAWeight` nodes, or adapters alone; arrays or shapes. Or a
            `jaxlora.nnx.Adapted`. Of variables of Flax NNX the parameters alone are counted, not
            statistics, caches, or the keys and counts of random streams.

    Returns:
        One row for each leaf, and the totals.

    Raises:
        ValueError: the tree is empty.
        TypeError: no leaf of it is an array, the shape of one, or a node that stands for one.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> print(jaxlora.summary(params))
    path  shape   rank  trainable  total  bytes
    ----  ------  ----  ---------  -----  -----
    w     (4, 3)  1     7          19     76
    <BLANKLINE>
    trainable 7 of 19 parameters (36.84%), 28 of 76 bytes
    """
    leaves, _ = paths.flatten(modules.parameters(params))
    if not leaves:
        raise ValueError("params is an empty tree: there is nothing to count")
    if not any(tree_checks.is_weight(leaf) or paths.is_trained(leaf) for leaf in leaves.values()):
        raise TypeError(f"params must be a tree of arrays: got {checks.shown(params)}")
    return Summary(tuple(row for path, leaf in leaves.items() for row in _rows(path, leaf)))


def _rows(path: str, leaf: Leaf) -> Iterator[Row]:
    """Return the row of a leaf, or one for each part of it that is adapted; the first counts it."""
    if isinstance(leaf, Node):
        for i, term in enumerate(leaf.terms):
            yield _row(blocks.name(path, term.block), None if i else leaf.base, term)
    elif isinstance(leaf, Adapter | Replacement):
        yield _row(path, None, leaf)
    elif not _is_key(leaf):
        size, nbytes = _size(leaf), _bytes(leaf)
        yield Row(path, tuple(getattr(leaf, "shape", ())), 0, 0, size, 0, nbytes)


def _row(path: str, base: Leaf, term: Adapter | Replacement) -> Row:
    """Return the row of what is trained of a leaf, which counts the leaf too if there is one."""
    arrays = term.trained().values()
    trainable, trainable_bytes = sum(map(_size, arrays)), sum(map(_bytes, arrays))
    return Row(
        path,
        blocks.shape(term.block, term.shape),
        term.rank,
        trainable,
        trainable + _size(base),
        trainable_bytes,
        trainable_bytes + _bytes(base),
    )


def _is_key(x: Leaf) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _size(x: Leaf) -> int:
    return math.prod(x.shape) if hasattr(x, "shape") else 0


def _bytes(x: Leaf) -> int:
    if isinstance(x, QuantizedWeight):
        return x.nbytes
    return _size(x) * x.dtype.itemsize if hasattr(x, "shape") else 0
