"""The singular values of what adapters add to their weights."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlora.analysis import operands
from jaxlora.analysis.findings import Findings, register, told
from jaxlora.analysis.operands import Operand
from jaxlora.linalg import svd
from jaxlora.types import PyTree

DEAD = 1e-6  # of the largest singular value: float32 tells no smaller one from 0
MOST = 0.9  # of the energy, which the table tells the rank for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of the product of one adapter, of each entry of its stack.

    Attributes:
        values: singular values of ``scaling * a b``, ``(*stack, rank)``, falling, float32.
        weight_norm: Frobenius norm of the weight, ``(*stack,)``, None where it is not known.
    """

    values: jax.Array
    weight_norm: jax.Array | None

    @property
    def norm(self) -> jax.Array:
        """Frobenius norm of the product, ``(*stack,)``."""
        return jnp.linalg.norm(self.values, axis=-1)

    @property
    def share(self) -> jax.Array | None:
        """Norm of the product over that of the weight, ``(*stack,)``; None as the latter is."""
        return None if self.weight_norm is None else over(self.norm, self.weight_norm)

    @property
    def effective_rank(self) -> jax.Array:
        """``exp(H(p))``, ``(*stack,)``, H the entropy of the values over their sum; 0 of a zero.

        Roy and Vetterli 2007, "The effective rank", definition 1.
        """
        p = over(self.values, self.values.sum(-1, keepdims=True))
        entropy = -(p * jnp.log(jnp.where(p == 0, 1, p))).sum(-1)
        return jnp.where(self.values[..., 0] == 0, 0, jnp.exp(entropy))

    @property
    def stable_rank(self) -> jax.Array:
        """Squared Frobenius norm over the largest squared value, ``(*stack,)``; 0 of a zero."""
        return over(self.norm, self.values[..., 0]) ** 2

    @property
    def energy(self) -> jax.Array:
        """Share of the squared norm in the first k values, ``(*stack, rank)``; 0 of a zero."""
        squares = jnp.square(over(self.values, self.values[..., :1]))
        return over(jnp.cumsum(squares, -1), squares.sum(-1, keepdims=True))

    @property
    def left(self) -> jax.Array:
        """Norm of all but the first k values over that of all, ``(*stack, rank)``; 0 of a zero."""
        squares = jnp.square(over(self.values, self.values[..., :1]))
        behind = jnp.flip(jnp.cumsum(jnp.flip(squares, -1), -1), -1)  # of value k and all later
        left = jnp.concatenate([behind[..., 1:], jnp.zeros_like(behind[..., :1])], -1)
        return jnp.sqrt(over(left, behind[..., :1]))

    @property
    def dead(self) -> jax.Array:
        """How many directions do nothing, ``(*stack,)``: values of at most 1e-6 of the largest."""
        return jnp.sum(self.values <= DEAD * self.values[..., :1], -1)

    def rank_for(self, energy: float) -> jax.Array:
        """Return the least rank with this share of the squared norm, ``(*stack,)``; 0 of a zero."""
        found = jnp.minimum(1 + jnp.sum(self.energy < energy, -1), self.values.shape[-1])
        return jnp.where(self.values[..., 0] == 0, 0, found)


@register
@dataclasses.dataclass(frozen=True, repr=False)
class Spectra(Findings[Spectrum]):
    """The spectrum of each adapter."""

    header = ("rank", "norm", "of the weight", "effective", "stable", "for 90 %", "dead")

    def cells(self, path: str) -> tuple[str, ...]:
        """Return what the table says of a weight."""
        found = self.found[path]
        share = "" if (part := found.share) is None else told(part, ".2%")
        numbers = [told(x) for x in (found.effective_rank, found.stable_rank)]
        ranks = [told(x, ".0f") for x in (found.rank_for(MOST), found.dead)]
        return (str(found.values.shape[-1]), told(found.norm), share, *numbers, *ranks)


def spectrum(params: PyTree, base: PyTree | None = None) -> Spectra:
    """Return the singular values of what each adapter adds to its weight.

    They are those of an ``(rank, rank)`` matrix, from QR decompositions of the factors. Of an
    adapter with a magnitude they are of its product alone.

    Args:
        params: adapters by path, or a tree with adapted weights.
        base: the weights that adapters are for; a tree has them already. With them it is told how
            large the product is beside the weight.

    Returns:
        A `Spectrum` by path.

    Raises:
        TypeError: params holds neither adapters nor adapted weights.
        ValueError: there are none with factors, or they do not fit the base.

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=2, initializer="orthogonal")
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.eye(4, 3)}, x, config=config)
    >>> base, adapters = jaxlora.split(params)
    >>> jaxlora.analysis.spectrum(adapters)["w"].values.tolist()  # b is zero yet
    [0.0, 0.0]
    """
    found, left_out = operands.read(params, base, "spectrum(params)", "params")
    return Spectra(
        {path: operands.run(_spectrum, operand) for path, operand in found.items()}, left_out
    )


@jax.jit
def _spectrum(operand: Operand) -> Spectrum:
    values = svd.values_of_product(*operand.factors())
    return Spectrum(values, None if operand.base is None else norm(operand.weight()))


def norm(matrix: jax.Array) -> jax.Array:
    """Return the Frobenius norm ``(*stack,)`` of matrices ``(*stack, in, out)``."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix), (-2, -1)))


def over(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Return a quotient, 0 where what it is divided by is 0."""
    return jnp.where(whole == 0, 0, part / jnp.where(whole == 0, 1, whole))
