"""Experts: one stack of weights in every form in which programs multiply with it."""

import jax
import jax.numpy as jnp
from jax import lax

from cases.base import Case, case, normal

EXPERTS, IN, OUT, TOKENS, CHOSEN = 4, 8, 6, 10, 2
INDICES = jax.random.randint(jax.random.key(3), (TOKENS, CHOSEN), 0, EXPERTS)
GATES = normal(4, TOKENS, CHOSEN)

FORMS = {
    "one for each token": lambda w, x: jnp.einsum("td,tdf->tf", x, w[INDICES[:, 0]]),
    "several, einsum": lambda w, x: jnp.einsum("td,tkdf->tkf", x, w[INDICES]),
    "several, matmul": lambda w, x: (x[:, None, None] @ w[INDICES])[:, :, 0],
    "several, vmap": lambda w, x: jax.vmap(lambda x, chosen: jax.vmap(lambda e: x @ w[e])(chosen))(
        x, INDICES
    ),
    "several, summed by gates": lambda w, x: jnp.einsum("td,tkdf,tk->tf", x, w[INDICES], GATES),
    "take": lambda w, x: jnp.einsum("td,tkdf->tkf", x, jnp.take(w, INDICES, axis=0)),
    "loop": lambda w, x: sum(x @ w[e] * (e + 1.0) for e in range(EXPERTS)),
    "loop by index": lambda w, x: sum(x @ w[jnp.int32(e)] for e in range(EXPERTS)),
    "scan": lambda w, x: lax.scan(lambda c, w: (c + x @ w, None), jnp.zeros((TOKENS, OUT)), w)[0],
    "ragged": lambda w, x: lax.ragged_dot(x, w, jnp.array([3, 0, 5, 2])),
    "an input for each": lambda w, x: jnp.einsum("etd,edf->tef", jnp.stack([x, -x, 2 * x, x]), w),
}
SHARED_FORMS = {  # in which the program itself does not tell that they are a stack
    "dense": lambda w, x: jnp.einsum("td,edf->tef", x, w),
    "dense, summed": lambda w, x: jnp.einsum("ted,edf->tf", jnp.stack([x, -x, 2 * x, x], 1), w),
    "dense, vmap": lambda w, x: jax.vmap(lambda w: x @ w)(w),
    "one-hot": lambda w, x: jnp.einsum(
        "te,td,edf->tf", jax.nn.one_hot(INDICES[:, 0], EXPERTS), x, w
    ),
}
W, X = normal(0, EXPERTS, IN, OUT), normal(1, TOKENS, IN)


@case
def experts_chosen_by_a_router():
    """A mixture as Mixtral's: gathered gates and up projections, gathered down projections."""

    def fn(params, x):
        scores, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]), CHOSEN)
        h = jnp.einsum("td,tkdf->tkf", x, params["gate_up"][chosen])
        h = jax.nn.silu(h[..., :3]) * h[..., 3:]
        return jnp.einsum("tkf,tkfd,tk->td", h, params["down"][chosen], scores)

    params = {"router": normal(5, IN, EXPERTS), "gate_up": W, "down": normal(2, EXPERTS, 3, IN)}
    return Case(fn, params, (X,), compiled=True)
