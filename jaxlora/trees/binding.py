"""Trees with adapted weights: split them, and put them together.

A tree of parameters and the same tree with `LoRAWeight` nodes in it differ only at those nodes,
so every function here is one pass over the leaves by path.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxlora.messages import checks
from jaxlora.types import Leaf, Leaves, PyTree
from jaxlora.weights import blocks, fingerprints, modules, paths, tree_checks
from jaxlora.weights.adapters import Adapter, Adapters, Replacement
from jaxlora.weights.fingerprints import Fingerprint
from jaxlora.weights.nodes import LoRAWeight, TrainedLeaf, over


def split(params: PyTree) -> tuple[PyTree, Adapters]:
    """Split a tree into its frozen base and its trainable factors.

    Args:
        params: a tree with `LoRAWeight` nodes.

    Returns:
        The tree with each node's base in its place, and the factors by path. `bind` undoes it,
        except dropout, which is chosen for each step.

    Raises:
        TypeError: params holds adapters without their base.
        ValueError: no leaf is adapted, or two leaves have the same path.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> base["w"].shape, adapters
    ((4, 3), {'w': Adapter(a=(4, 1), b=(1, 3), alpha=16)})
    """
    instead = "use adapted.adapters(), or split adapted.params()"
    leaves, treedef = tree_checks.flatten_adapted(params, instead, "they are split already")
    adapters: Adapters = {}
    for path, leaf in leaves.items():
        if not isinstance(leaf, LoRAWeight | TrainedLeaf):
            continue
        leaves[path] = leaf.base
        for term in leaf.terms:
            known = fingerprints.take(leaf.base, term.block)
            name = blocks.name(path, term.block)
            adapters[name] = dataclasses.replace(term, fingerprint=known)
    return treedef.unflatten(leaves.values()), adapters


def bind(base: PyTree, adapters: Adapters, *, check_base: bool = True) -> PyTree:
    """Put a frozen base and factors together; the opposite of `split`.

    Adapters know the weights that they were made for, and are refused on others: on those that
    they were merged into already, or on a cast of them. Values are compared where they are known,
    and not under `jax.jit` or for shapes; adapters that JAX mapped together with those of other
    bases, or ran through one compiled program, are for any of these bases.

    Args:
        base: a plain tree.
        adapters: factors by path.
        check_base: False puts adapters on any floating weights of their shapes.

    Returns:
        The tree with a `LoRAWeight` at each path of adapters.

    Raises:
        TypeError: base is no tree of weights, a value of adapters no `Adapter` or `Replacement`, or
            check_base no bool.
        ValueError: a path is not in base, is adapted already, holds no floating weight, has another
            shape, dtype or other values; adapters overlap, or have an alpha that is not finite
            and positive.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> jaxlora.bind(*jaxlora.split(params))
    {'w': LoRAWeight(base=(4, 3), a=(4, 1), b=(1, 3), alpha=16)}
    """
    modules.refuse_adapted("base", base, "use jaxlora.nnx.Adapted(adapted.model, adapters)")
    checks.check_flag(check_base, "check_base")
    leaves, treedef = paths.flatten(base)
    tree_checks.check_leaves(leaves, base, "bind(base, adapters)", "base")
    nodes = nodes_over(leaves, adapters, check_base=check_base)
    return treedef.unflatten((leaves | nodes).values())


def nodes_over(
    leaves: Leaves, adapters: Adapters, *, check_base: bool
) -> dict[str, LoRAWeight | TrainedLeaf]:
    """Return the node of each leaf that adapters are for, or raise where one is for none.

    Args:
        leaves: the leaves of a plain tree by path.
        adapters: what is trained of them, by path.
        check_base: whether the leaves must be those that the adapters were made for.
    """
    tree_checks.check_adapters(adapters, some=True)
    terms: dict[str, list[Adapter | Replacement]] = {}
    for name, adapter in adapters.items():
        path, text = blocks.locate(name, leaves)
        if path not in leaves:
            raise ValueError(f"the base has no leaf {path!r}; {paths.nearest(path, leaves)}")
        leaf = leaves[path]
        if paths.is_trained(leaf):
            raise ValueError(f"the leaf {path!r} is adapted already: a plain tree is needed")
        others = terms.setdefault(path, [])
        if others and None in (text, others[0].block):
            raise ValueError(f"adapters has two for the leaf {path!r}, and one of them is for all")
        term = fitted(name, path, text, leaf, adapter)
        for other in others:
            _check_disjoint(path, other, term)
        others.append(dataclasses.replace(term, fingerprint=Fingerprint()))
        if check_base:
            _check_base(name, leaf, adapter)
    return {path: over(leaves[path], found) for path, found in terms.items()}


def _check_disjoint(path: str, one: Leaf, other: Leaf) -> None:
    """Raise if the terms of two parts of one leaf cannot stand side by side."""
    if blocks.overlap(one.block, other.block):
        names = f"{blocks.name(path, other.block)!r} and {blocks.name(path, one.block)!r}"
        raise ValueError(f"the adapters of {names} overlap: one element has one adapter")
    if one.roles != other.roles:
        raise ValueError(f"the adapters of parts of {path!r} differ in the roles of its axes")


def fitted(
    name: str, path: str, text: str | None, leaf: Leaf, adapter: Adapter | Replacement
) -> Adapter | Replacement:
    """Return an adapter with the block that its name says, or raise if it does not fit a leaf.

    Args:
        name: its name among others.
        path: path of the leaf.
        text: what the name says of the block, see `jaxlora.weights.blocks.locate`.
        leaf: the leaf.
        adapter: what is trained of it.
    """
    if not hasattr(leaf, "shape") or tuple(leaf.shape) != tuple(adapter.shape):
        what = "a weight" if isinstance(adapter, Adapter) else "a leaf"
        found = getattr(leaf, "shape", type(leaf).__name__)
        raise ValueError(
            f"the {adapter.what} of {path!r} is for {what} of shape {adapter.shape}: got {found}"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"the leaf {path!r} cannot be adapted: its dtype is {leaf.dtype}, not floating"
        )
    block = blocks.resolve(text, leaf.shape)
    if isinstance(adapter, Adapter):
        _check_alpha(path, adapter.alpha)
        if block != adapter.block is not None:
            own = blocks.name(path, adapter.block)
            raise ValueError(f"the adapter {name!r} is for another part: it must be named {own!r}")
        adapter = dataclasses.replace(adapter, block=block)
    elif text is not None:
        raise ValueError(f"a replacement must be for a whole leaf or for rows of it: got {name!r}")
    _check_shapes(path, adapter)
    return adapter


def _check_alpha(path: str, alpha: object) -> None:
    """Raise if an alpha is no number, or not finite and positive."""
    if not (isinstance(alpha, float | int | np.floating) and 0 < alpha < math.inf):
        raise ValueError(f"the alpha of {path!r} must be finite and positive: got {alpha}")


def _check_shapes(path: str, adapter: Adapter | Replacement) -> None:
    """Raise if an array of an adapter does not have the shape that its weight asks for."""
    wanted, trained = adapter.shapes(), adapter.trained()
    wrong = [name for name, array in trained.items() if tuple(array.shape) != wanted[name]]
    if {"a", "b"} & {*wrong}:
        got = {name: tuple(trained[name].shape) for name in ("a", "b")}
        raise ValueError(
            f"the factors of {path!r} must have the shapes a={wanted['a']}, b={wanted['b']}: "
            f"got a={got['a']}, b={got['b']}"
        )
    for name in wrong:
        shape = tuple(trained[name].shape)
        raise ValueError(f"the {name} of {path!r} must have the shape {wanted[name]}: got {shape}")
    has_magnitude = isinstance(adapter, Adapter) and adapter.magnitude is not None
    if has_magnitude and not blocks.has_all_of(adapter.block, adapter.roles.in_):
        raise ValueError(
            f"the magnitude of {path!r} must be of whole columns, all along the in axes "
            f"{adapter.roles.in_}: got that of {blocks.name(path, adapter.block)!r}"
        )


def _check_base(path: str, leaf: Leaf, adapter: Adapter | Replacement) -> None:
    """Raise if a leaf is known to be none that an adapter was made for."""
    if (wrong := adapter.fingerprint.refusal(leaf)) is None:
        return
    raise ValueError(
        f"the adapters of {path!r} are for another base, it {wrong}{changed_hint(adapter)}: they "
        "were merged into it already, or are for other weights; check_base=False puts them on any "
        "weight of their shape"
    )


def changed_hint(adapter: Adapter | Replacement) -> str:
    """Return what is needed in the place of a wrong base, if an initializer has changed it."""
    changed = adapter.changed
    if not changed:
        return ""
    other = "" if changed == "loftq" else ", or jaxlora.algebra.rebase"
    return f"; the base that {changed} has left is needed{other}"
