"""How the factors start.

An initializer is a function ``(key, shape, dtype) -> a`` as in `jax.nn.initializers`, and any of
those will do; ``b`` starts at zero, so that a fresh adapter changes nothing. It is called for each
entry of a stack with ``shape = (in, rank)``, where ``in`` is the product of the weight's in axes,
so that fan-in means what it says.

A `FromWeight` makes both factors of the weight, or of data and the weight, and their product is
taken out of the base, so that training starts from directions that matter and the output stays what
it was.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlora.linalg import svd
from jaxlora.messages import checks
from jaxlora.weights import tree_checks

Initializer = Callable[..., Any]
InitializerName = Literal["uniform", "normal", "kaiming", "orthogonal", "pissa", "milora", "olora"]


@dataclasses.dataclass(frozen=True)
class FromWeight:
    """An initializer of both factors from the weight.

    Attributes:
        name: what adapters and errors call it.
        factors: a function ``(key, weight, rank, scaling) -> (a, b)`` of a float32 matrix
            ``(in, out)``; ``scaling * a b`` is taken out of the base.
        changes_base: the product is not zero.
        data: what the function gets behind the others, for each target one array for each entry of
            its stack, from `jaxlora.moments` or `jaxlora.gradients`; or None.
    """

    name: str
    factors: Callable[..., tuple[jax.Array, jax.Array]]
    changes_base: bool = True
    data: Mapping[str, jax.Array] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str: got {checks.shown(self.name)}")
        if not checks.is_function(self.factors):
            raise TypeError(
                "factors must be a function (key, weight, rank, scaling) -> (a, b): "
                f"got {checks.shown(self.factors)}"
            )
        checks.check_flag(self.changes_base, "changes_base")
        if self.data is not None:
            tree_checks.check_matrices(self.data, "data")


def uniform(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution on ±1/√in, the default of loralib and PEFT."""
    _check("uniform", key, shape, dtype)
    # one product, last: with one rounding the bits are the same however operations are fused
    return jax.random.uniform(key, shape, dtype, -1, 1) * (1 / math.sqrt(shape[0]))


def normal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from the normal distribution with standard deviation 1/rank, PEFT's "gaussian"."""
    _check("normal", key, shape, dtype)
    return jax.random.normal(key, shape, dtype) / shape[1]


def kaiming(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw from the uniform distribution on ±√(6/in) (He et al. 2015, arXiv:1502.01852)."""
    _check("kaiming", key, shape, dtype)
    return jax.nn.initializers.he_uniform()(key, shape, dtype)


def orthogonal(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw orthonormal columns, evenly among all (Saxe et al. 2014, arXiv:1312.6120)."""
    _check("orthogonal", key, shape, dtype)
    return jax.nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


def _check(name: str, key: Any, shape: Any, dtype: Any) -> None:
    """Raise for wrong arguments of an initializer of ``a``."""
    checks.check_key(key, f"{name}(key, shape, dtype)")
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise TypeError(f"shape must be a pair (in, rank): got {checks.shown(shape)}")
    for i, size in enumerate(shape):
        checks.check_count(size, f"shape[{i}]")
    checks.check_dtype(dtype, "dtype")


def pissa(iterations: int | None = None) -> FromWeight:
    """Return the start at the largest singular values (Meng et al. 2024, arXiv:2404.02948).

    Args:
        iterations: of the randomized decomposition (see the paper's appendix on fast SVD), at
            least 0, 8 being ample; None decomposes exactly, which takes much longer.

    Raises:
        TypeError: iterations is no int.
        ValueError: iterations is negative.

    >>> import jaxlora
    >>> jaxlora.LoRAConfig(rank=8, initializer=jaxlora.initializers.pissa(8)).initializer.name
    'pissa'
    """
    if iterations is not None:
        checks.check_count(iterations, "iterations", 0)

    def factors(key, weight, rank, scaling):
        if iterations is None:
            return svd.factors(svd.truncated(weight, rank), scaling)
        return svd.factors(svd.randomized(key, weight, rank, iterations), scaling)

    return FromWeight("pissa", factors)


def eva(moments: Mapping[str, jax.Array]) -> FromWeight:
    """Return the start at the directions in which the inputs vary most, with ``b`` zero.

    They are the first right singular vectors of all inputs (Paischer et al. 2024,
    arXiv:2410.07170), each of its rank, for which there is `eva_ranks`. The base stays as it is.

    Args:
        moments: from `jaxlora.moments`.

    Raises:
        TypeError: moments is no mapping of arrays.
        ValueError: it is empty, or an array is no stack of matrices.
    """
    tree_checks.check_matrices(moments, "moments")

    def factors(key, weight, rank, scaling, moments):
        del key, scaling
        vectors = jnp.linalg.eigh(moments)[1]
        return vectors[:, ::-1][:, :rank], jnp.zeros((rank, weight.shape[1]))

    return FromWeight("eva", factors, changes_base=False, data=moments)


def eva_ranks(moments: Mapping[str, jax.Array], rank: int, *, rho: float = 2.0) -> dict[str, int]:
    """Return ranks by target, larger where more directions hold much of the inputs' variance.

    The directions of all targets are ranked by their share of the variance of their inputs, and as
    many kept as a rank for each target makes (Paischer et al. 2024, section 3.3). For
    ``LoRAConfig(targets=tuple(ranks), rank_pattern=ranks)``: a target of which no direction is kept
    is not among them.

    Args:
        moments: from `jaxlora.moments`.
        rank: the mean rank, at least 1.
        rho: no rank is above ``round(rho * rank)``; at least 1.

    Raises:
        TypeError: moments is no mapping of arrays, rank no int, rho no number, or it is called in
            `jax.jit`.
        ValueError: moments is empty, or an array in it is no stack of matrices; rank or rho is
            below 1, or rho not finite.

    >>> import jax.numpy as jnp, jaxlora
    >>> even, steep = jnp.eye(6)[None], jnp.diag(4.0 ** -jnp.arange(6.0))[None]
    >>> jaxlora.initializers.eva_ranks({"even": even, "steep": steep}, 3)
    {'even': 4, 'steep': 2}
    """
    tree_checks.check_matrices(moments, "moments")
    tree_checks.check_untraced("eva_ranks", dict(moments))
    rank = checks.check_count(rank, "rank")
    rho = checks.check_number(rho, "rho", "finite and at least 1")
    most, shares = round(rho * rank), []
    for name, found in moments.items():
        values = jnp.maximum(jnp.linalg.eigvalsh(found)[:, ::-1], 0)
        mean = jnp.mean(values / values.sum(-1, keepdims=True), 0)[:most]
        shares += [(-float(share), name) for share in mean]
    left, ranks = rank * sum(map(len, moments.values())), dict.fromkeys(moments, 0)
    for _, name in sorted(shares, key=lambda pair: pair[0]):
        if len(moments[name]) <= left:
            ranks[name] += 1
            left -= len(moments[name])
    return {name: rank for name, rank in ranks.items() if rank}


def corda(moments: Mapping[str, jax.Array], *, keep: bool = False) -> FromWeight:
    """Return the start at what of a weight matters most, or least, for some inputs.

    With ``C = x^T x``, 0.01 of its mean added to its diagonal as PEFT does, and ``C W = u s v``, it
    is ``C^-1 u s v`` of the largest singular values (Yang et al. 2024, arXiv:2406.05223).

    Args:
        moments: from `jaxlora.moments`.
        keep: of the smallest instead, which keeps what is known about these inputs.

    Raises:
        TypeError: moments is no mapping of arrays, or keep no bool.
        ValueError: moments is empty, or an array in it is no stack of matrices.
    """
    tree_checks.check_matrices(moments, "moments")
    checks.check_flag(keep, "keep")

    def factors(key, weight, rank, scaling, moments):
        del key
        mean = jnp.trace(moments) / len(moments)
        damped = moments / mean + 0.01 * jnp.eye(len(moments))
        u, s, v = jnp.linalg.svd(damped @ weight, full_matrices=False)
        kept = slice(-rank, None) if keep else slice(rank)
        a, b = svd.factors((u[:, kept], s[kept], v[kept]), scaling)
        return jnp.linalg.solve(damped, a), b

    return FromWeight("corda", factors, data=moments)


def lora_ga(gradients: Mapping[str, jax.Array], *, gamma: float = 16.0) -> FromWeight:
    """Return the start whose first step is near that of full fine-tuning.

    With the gradient ``u s v`` of a weight, ``a`` is the first ``rank`` columns of u and ``b`` the
    next rows of ``s v`` times ``out^(1/4) / gamma^(1/2)`` (Wang et al. 2024, arXiv:2407.05000; with
    the directions and the scale of PEFT).

    Args:
        gradients: from `jaxlora.gradients`.
        gamma: the larger, the smaller ``b``; positive.

    Raises:
        TypeError: gradients is no mapping of arrays, or gamma no number.
        ValueError: gradients is empty, or an array in it is no stack of matrices; gamma is not
            finite and positive.
    """
    tree_checks.check_matrices(gradients, "gradients", "jaxlora.gradients")
    checks.check_number(gamma, "gamma", "finite and positive")

    def factors(key, weight, rank, scaling, gradient):
        del key, scaling
        u, s, v = svd.truncated(gradient, 2 * rank)
        b = s[rank:, None] * v[rank:] * weight.shape[1] ** 0.25 / gamma**0.5
        return u[:, :rank], b

    return FromWeight("lora_ga", factors, data=gradients)


@dataclasses.dataclass(frozen=True)
class LoftQ:
    """An initializer that makes up for quantizing, see `loftq`.

    Attributes:
        weights: the weights by path, as they were.
        iterations: how often the codes and the factors take turns.
    """

    weights: Mapping[str, Any] = dataclasses.field(hash=False)
    iterations: int = 1


def loftq(params: Any, *, iterations: int = 1) -> LoftQ:
    """Return the start that makes up for what quantizing has rounded.

    The codes are made anew and the factors with them, so that their sum is nearest to the weight as
    it was (Li et al. 2023, arXiv:2310.08659). It is for weights from `jaxlora.quantize` alone.

    Args:
        params: the tree before it was quantized; its targets are read.
        iterations: how often the codes and the factors take turns, at least 1.

    Raises:
        TypeError: params is no tree of weights, or iterations no int.
        ValueError: iterations is below 1.
    """
    iterations = checks.check_count(iterations, "iterations")
    return LoftQ(tree_checks.check_tree(params, "loftq(params, iterations=1)"), iterations)


def _milora(key, weight, rank, scaling):
    """Start at the smallest singular values (Wang et al. 2024, arXiv:2406.09044)."""
    del key
    u, s, v = jnp.linalg.svd(weight, full_matrices=False)
    return svd.factors((u[:, -rank:], s[-rank:], v[-rank:]), scaling)


def _olora(key, weight, rank, scaling):
    """Start at the first columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775).

    As PEFT's, it decomposes the transpose, ``(out, in)``, and does not divide by the scaling.
    """
    del key, scaling
    q, r = jnp.linalg.qr(weight.T)
    return r[:rank].T, q[:, :rank].T


NAMED: dict[str, Initializer | FromWeight] = {
    "uniform": uniform,
    "normal": normal,
    "kaiming": kaiming,
    "orthogonal": orthogonal,
    "pissa": pissa(),
    "milora": FromWeight("milora", _milora),
    "olora": FromWeight("olora", _olora),
}
