"""Learning rates and weight decays of their own for each factor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlora.messages import checks
from jaxlora.optim.factor_names import by_factor, check_has_params, init_stateless

if TYPE_CHECKING:
    import optax


def scale_rates(
    *, a: float = 1.0, b: float = 1.0, magnitude: float = 1.0
) -> optax.GradientTransformation:
    """Multiply the updates of each factor, and so its learning rate, by a number.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives ``b`` a larger one: ``b=16`` after the
    optimizer. A weight decay before this is multiplied too, as in PEFT's parameter groups.

    Args:
        a: for the factors on the input side, finite and positive.
        b: for the factors on the output side.
        magnitude: for the magnitudes.

    Raises:
        ValueError: a number is not finite and positive; at ``init``, a tree without factors.

    >>> import jax, jax.numpy as jnp, jaxlora, optax
    >>> model, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    >>> config = jaxlora.LoRAConfig(rank=1)
    >>> params = jaxlora.init(jax.random.key(0), model, {"w": jnp.ones((4, 3))}, x, config=config)
    >>> _, adapters = jaxlora.split(params)
    >>> tx = optax.chain(optax.sgd(0.5), jaxlora.optim.scale_rates(b=16))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, adapters), tx.init(adapters))
    >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
    (-0.5, -8.0)
    """
    import optax

    rates = _checked("finite and positive", a=a, b=b, magnitude=magnitude)

    def update(updates, state, params=None):
        del params
        return by_factor(lambda name, u: u * rates.get(name, 1), updates), state

    return optax.GradientTransformation(init_stateless, update)


def decay_factors(
    *, a: float = 0.0, b: float = 0.0, magnitude: float = 0.0
) -> optax.GradientTransformation:
    """Add to the updates of each factor a multiple of the factor, a weight decay of its own.

    It stands where `optax.add_decayed_weights` would, before the learning rate.

    Args:
        a: for the factors on the input side, finite and not negative.
        b: for the factors on the output side.
        magnitude: for the magnitudes.

    Raises:
        ValueError: a number is not finite or negative; at ``init``, a tree without factors; at
            ``update``, no params.
    """
    import optax

    decays = _checked("finite and not negative", a=a, b=b, magnitude=magnitude)

    def update(updates, state, params=None):
        check_has_params(params)
        return by_factor(lambda name, u, p: u + decays.get(name, 0) * p, updates, params), state

    return optax.GradientTransformation(init_stateless, update)


def _checked(needed: str, **numbers: float) -> dict[str, float]:
    return {name: checks.check_number(x, name, needed) for name, x in numbers.items()}
