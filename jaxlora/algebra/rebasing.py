"""Adapters for another base: for the one that was there before an initializer changed it."""

import dataclasses

import jax.numpy as jnp

from jaxlora.trees.binding import fitted
from jaxlora.types import Leaf, PyTree
from jaxlora.weights import blocks, fingerprints, paths, tree_checks
from jaxlora.weights.adapters import Adapter, Adapters, Replacement


def rebase(adapters: Adapters, initial: Adapters, *, base: PyTree) -> Adapters:
    """Turn adapters for a base that their initializer changed into those for the base as it was.

    With ``W' = W - s a0 b0`` the weight in effect is ``W' + s a b = W + s [a, a0] [b; -b0]``: of
    twice the rank, and exact except for the rounding of W' to the dtype of the base.

    Args:
        adapters: factors by path, trained.
        initial: the factors as `jaxlora.init` made them.
        base: the plain tree that was given to `jaxlora.init`.

    Returns:
        Factors by path, with the same scaling.

    Raises:
        TypeError: a value of adapters or initial is no adapter, or base no tree of weights.
        ValueError: base is adapted; adapters and initial differ in paths, shapes or base; an
            adapter is for a base that nothing changed, or does not fit this one; this is the
            changed one.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x, w = lambda p, x: x @ p["w"], jnp.ones((2, 4)), {"w": jnp.eye(4, 3)}
    >>> config = jaxlora.LoRAConfig(rank=1, initializer="pissa")
    >>> params = jaxlora.init(jax.random.key(0), model, w, x, config=config)
    >>> _, initial = jaxlora.split(params)
    >>> jaxlora.algebra.rebase(initial, initial, base=w)
    {'w': Adapter(a=(4, 2), b=(2, 3), alpha=32)}
    """
    tree_checks.check_adapters(adapters)
    tree_checks.check_adapters(initial, "initial")
    if odd := sorted({*adapters} ^ {*initial}):
        raise ValueError(
            f"adapters and initial must have the same paths: {odd[0]!r} is in one alone"
        )
    leaves = tree_checks.check_tree(base, "rebase(adapters, initial, base=base)", "base")
    tree_checks.check_plain(leaves, "rebase")
    plain: Adapters = {}
    for name, adapter in adapters.items():
        path, text = blocks.locate(name, leaves)
        if path not in leaves:
            raise ValueError(f"the base has no leaf {path!r}; {paths.nearest(path, leaves)}")
        known = fingerprints.take(leaves[path], blocks.resolve(text, leaves[path].shape))
        if isinstance(adapter, Adapter):
            fitted(name, path, text, leaves[path], adapter)
            adapter = _joined(name, adapter, initial[name], leaves[path])
        plain[name] = dataclasses.replace(adapter, fingerprint=known)
    return plain


def _joined(name: str, adapter: Adapter, first: Adapter | Replacement, base: Leaf) -> Adapter:
    """Return the adapter of the difference of two products, for the base before both."""
    if adapter.changed == "loftq":
        raise ValueError(
            f"the base of {name!r} was quantized anew for 'loftq', and not by a product"
        )
    if not adapter.changed:
        raise ValueError(f"the adapter of {name!r} is plain: nothing changed its base")
    if not isinstance(first, Adapter):
        raise ValueError(
            f"initial[{name!r}] must be an Adapter, as adapters has: got a replacement"
        )
    wanted, got = ((x.roles, x.shape, x.a.shape[:-1]) for x in (adapter, first))
    if not adapter.fingerprint.may_equal(first.fingerprint):
        hashes = adapter.fingerprint.digest, first.fingerprint.digest
        raise ValueError(
            f"adapters and initial must be of one base: {name!r} has the hashes {hashes}"
        )
    if wanted != got:
        raise ValueError(f"adapters and initial must be of one base: {name!r} is {wanted}, {got}")
    count = len(adapter.roles.stack)
    scale, ratio = (x.scaling for x in (adapter, first))
    a = jnp.concatenate([adapter.a, first.a], axis=-1)
    b = jnp.concatenate([adapter.b, -(ratio / scale) * first.b], axis=count)
    if adapter.fingerprint.is_known(base):
        raise ValueError(
            f"the base must be that given to init: {name!r} is what {adapter.changed!r} left of it"
        )
    return dataclasses.replace(adapter, a=a, b=b, alpha=scale * a.shape[-1], changed="")
