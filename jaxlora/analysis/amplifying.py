"""How much stronger adapters make what weights do already in the directions that they act in."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlora.analysis import operands
from jaxlora.analysis.findings import Findings, register, told
from jaxlora.analysis.operands import Operand
from jaxlora.analysis.spectra import DEAD, norm, over
from jaxlora.linalg import svd
from jaxlora.linalg.precise import matmul
from jaxlora.types import PyTree
from jaxlora.weights import tree_checks
from jaxlora.weights.adapters import Adapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norms:
    """The norms that an amplification is a quotient of; all Frobenius norms, ``(*stack,)``.

    With the first singular vectors U and V of a matrix, as many as the adapter has directions, the
    norm of a weight within them is ``||U^T W V||``.

    Attributes:
        product: of what the adapter adds.
        weight: of the weight.
        within_product: of the weight within the directions of what is added.
        within_weight: of the weight within its own first directions.
        within_random: of the weight within random directions, the root of the mean square.
    """

    product: jax.Array
    weight: jax.Array
    within_product: jax.Array
    within_weight: jax.Array
    within_random: jax.Array


@register
@dataclasses.dataclass(frozen=True, repr=False)
class Amplification(Findings[jax.Array]):
    """The amplification ``||product|| / ||U^T W V||`` by path, ``(*stack,)``.

    It is infinite where the weight does nothing in these directions, and 0 of a product that is 0.

    Attributes:
        norms: the norms that it is made of, by path.
    """

    header = ("factor", "product", "weight", "in its directions", "in own", "in random")

    norms: dict[str, Norms]

    def cells(self, path: str) -> tuple[str, ...]:
        """Return what the table says of a weight."""
        norms = self.norms[path]
        within = (norms.within_product, norms.within_weight, norms.within_random)
        return tuple(map(told, (self.found[path], norms.product, norms.weight, *within)))


def amplification(base: PyTree, adapters: Adapters) -> Amplification:
    """Return how much stronger each adapter makes the directions that it acts in.

    That is the norm of its product over that of the weight in the same directions (Hu et al. 2021,
    arXiv:2106.09685, section 7.3 and table 7). The norm of the weight in its own first directions
    and in random ones stands beside it: were those of the adapter the first of the weight, it
    would only repeat what is there. The singular values of each weight are computed for that,
    one weight at a time.

    Args:
        base: the weights that adapters are for, a plain tree.
        adapters: factors by path. Of one with a magnitude the product alone is looked at.

    Returns:
        The amplification by path, ``(*stack,)``.

    Raises:
        TypeError: base is no tree of weights, or adapters no adapters.
        ValueError: there are none with factors, or they do not fit the base.
    """
    tree_checks.check_adapters(adapters, some=True)
    found, left_out = operands.on_base(adapters, base, "amplification(base, adapters)")
    norms = {path: operands.run(_norms, operand) for path, operand in found.items()}
    factors = {path: _factor(each) for path, each in norms.items()}
    return Amplification(factors, left_out, norms)


@jax.jit
def _norms(operand: Operand) -> Norms:
    a, b = operand.factors()
    weight = operand.weight()
    u, s, v = svd.of_product(a, b, a.shape[-1])
    acts = (s > DEAD * s[..., :1]).astype(s.dtype)  # the others are directions of rounding
    within = matmul(matmul(u.mT, weight), v.mT) * acts[..., None, :] * acts[..., :, None]
    own = jnp.linalg.svd(weight, compute_uv=False)[..., : s.shape[-1]] * acts
    # the mean of ||U^T W V||² over random U and V of k columns is k² ||W||² / (in out)
    random = acts.sum(-1) * norm(weight) / jnp.sqrt(weight.shape[-2] * weight.shape[-1])
    return Norms(
        jnp.linalg.norm(s, axis=-1), norm(weight), norm(within), norm(own[..., None]), random
    )


def _factor(norms: Norms) -> jax.Array:
    is_blind = (norms.within_product == 0) & (norms.product > 0)
    return jnp.where(is_blind, jnp.inf, over(norms.product, norms.within_product))
