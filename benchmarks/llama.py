"""Count the bytes of a training step of a Llama of 7 billion weights, plain and quantized.

Nothing of it is made: the step is compiled for the shapes. The model has the sizes of Llama 2 7B
(Touvron et al. 2023, arXiv:2307.09288, table 1 and the released configuration), its layers scanned
and computed again in the backward pass, and adapters on every product. The head and the products
of the layers are quantized, the table of tokens and the norms stay in bfloat16.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import optax
import report

import jaxlora

KINDS = ("bfloat16", "int8", "int4", "nf4")


def shapes(options: argparse.Namespace) -> Any:
    """Return the shapes of the parameters."""
    d, f, v = options.width, options.hidden, options.vocabulary
    layer: dict[str, tuple[int, ...]] = {name: (d, d) for name in "qkvo"}
    layer |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    layer |= {"attention_norm": (d,), "norm": (d,)}

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    layers = {name: shape(options.layers, *sizes) for name, sizes in layer.items()}
    return {"embed": shape(v, d), "layers": layers, "norm": shape(d), "head": shape(d, v)}


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return rows of root mean square 1, scaled."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide**2, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


def rotated(x: jax.Array) -> jax.Array:
    """Return heads ``(batch, time, head, size)`` turned by their place (arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    rates = 1e4 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None, None] * rates
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def block(x: jax.Array, w: Any, heads: int) -> jax.Array:
    """Return the output of one layer, ``(batch, time, width)`` as x."""
    h = normed(x, w["attention_norm"])
    q, k, v = ((h @ w[name]).reshape(*h.shape[:2], heads, -1) for name in "qkv")
    h = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    x = x + h.reshape(x.shape) @ w["o"]
    h = normed(x, w["norm"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def forward(params: Any, tokens: jax.Array, heads: int) -> jax.Array:
    """Return logits ``(batch, time, vocabulary)`` for ids ``(batch, time)``."""

    @jax.checkpoint
    def layer(x, w):
        return block(x, w, heads), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return normed(x, params["norm"]) @ params["head"]


def next_tokens(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the mean loss of the tokens after those that the logits are of."""
    found = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), tokens[:, 1:]
    )
    return jnp.mean(found)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes of the step for each kind of base."""

    def model(params, tokens):
        return forward(params, tokens, options.heads)

    tokens = jax.ShapeDtypeStruct((options.batch, options.time), jnp.int32)
    config = jaxlora.LoRAConfig(rank=options.rank)
    rows = {}
    for kind in options.kinds:
        params = shapes(options)
        if kind != "bfloat16":
            how = jaxlora.QuantizationConfig(kind)
            params = jaxlora.quantize(model, params, tokens, config=how)
        params = jax.eval_shape(
            lambda params=params: jaxlora.init(
                jax.random.key(0), model, params, tokens, config=config
            )
        )
        rows[kind] = bytes_of_step(model, params, tokens)
        print(kind, rows[kind], flush=True)
    return rows


def bytes_of_step(model: Any, params: Any, tokens: Any) -> dict[str, float]:
    """Return gigabytes of the base, and of the arguments and temporaries of a step with AdamW."""
    base, adapters = jaxlora.split(params)
    tx = optax.adamw(1e-4)

    def loss(adapters, base, tokens):
        logits = jaxlora.lora(model, strict=True)(jaxlora.bind(base, adapters), tokens[:, :-1])
        return next_tokens(logits, tokens)

    state = jax.eval_shape(tx.init, adapters)
    step = models.training_step(loss, tx)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(adapters, state, base, tokens).compile()
    memory: Any = compiled.memory_analysis()
    return {
        "base_gb": jaxlora.summary(base).total_bytes / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {
        "layers": 32,
        "width": 4096,
        "hidden": 11008,
        "heads": 32,
        "vocabulary": 32000,
        "batch": 1,
        "time": 512,
        "rank": 8,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default all")
    parser.add_argument("--out", type=Path, help="write JSON here")
    options = parser.parse_args()
    results = measure(options)
    report.finish(options, results)


if __name__ == "__main__":
    main()
