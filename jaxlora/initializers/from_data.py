"""Initializers from the inputs or the gradients of weights, see `jaxlora.calibration`."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxlora.initializers.from_weight import FromWeight
from jaxlora.linalg import svd
from jaxlora.linalg.precise import matmul
from jaxlora.messages import checks
from jaxlora.weights import tree_checks


def eva(moments: Mapping[str, jax.Array]) -> FromWeight:
    """Return the start at the directions in which the inputs vary most, with ``b`` zero.

    They are the first right singular vectors of all inputs (Paischer et al. 2024,
    arXiv:2410.07170), each of its rank, for which there is `eva_ranks`. The base stays as it is.

    Args:
        moments: from `jaxlora.calibration.moments`.

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
        moments: from `jaxlora.calibration.moments`.
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
        whole = values.sum(-1, keepdims=True)  # 0 of an expert that no row came to
        mean = jnp.mean(values / jnp.where(whole > 0, whole, 1), 0)[:most]
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
        moments: from `jaxlora.calibration.moments`.
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
        damped = moments / jnp.where(mean > 0, mean, 1) + 0.01 * jnp.eye(len(moments))
        u, s, v = jnp.linalg.svd(matmul(damped, weight), full_matrices=False)
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
        gradients: from `jaxlora.calibration.gradients`.
        gamma: the larger, the smaller ``b``; positive.

    Raises:
        TypeError: gradients is no mapping of arrays, or gamma no number.
        ValueError: gradients is empty, or an array in it is no stack of matrices; gamma is not
            finite and positive.
    """
    tree_checks.check_matrices(gradients, "gradients", "jaxlora.calibration.gradients")
    checks.check_number(gamma, "gamma", "finite and positive")

    def factors(key, weight, rank, scaling, gradient):
        del key, scaling
        u, s, v = svd.truncated(gradient, 2 * rank)
        b = s[rank:, None] * v[rank:] * weight.shape[1] ** 0.25 / gamma**0.5
        return u[:, :rank], b

    return FromWeight("lora_ga", factors, data=gradients)
