"""GPT-2, Llama and experts as functions of a tree, and what transformers calls their weights.

Layers are leaves of their own in GPT-2, and a scanned stack in Llama, whose heads are axes.
"""

import jax
import jax.numpy as jnp

from jaxlora.formats import Names

WIDTH, HIDDEN, HEADS, GROUPS, LAYERS, VOCABULARY = 16, 24, 4, 2, 2, 19
PER_HEAD = WIDTH // HEADS
TOKENS = jax.random.randint(jax.random.key(0), (2, 7), 0, VOCABULARY)


def shapes(tree):
    """Return a tree of shapes as one of abstract arrays."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=is_shape)


def attention(q, k, v, *, is_causal=True):
    """Return attention, heads before their size."""
    count = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, count, 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / PER_HEAD**0.5
    if is_causal:
        seen = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
        scores = jnp.where(seen, scores, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


def row(bias):
    return bias[None, None]


def normed(x, weights):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * row(weights["scale"]) + row(weights["bias"])


def dense(x, weights):
    return x @ weights["kernel"] + row(weights["bias"])


def gpt2(params, tokens):
    """Return the logits, ``(batch, time, vocabulary)``."""
    x = params["wte"][tokens] + params["wpe"][jnp.arange(tokens.shape[1])][None]
    for i in range(LAYERS):
        layer = params[f"layer_{i}"]
        qkv = dense(normed(x, layer["ln_1"]), layer["qkv"])
        heads = (y.reshape(*y.shape[:2], HEADS, PER_HEAD) for y in jnp.split(qkv, 3, -1))
        x = x + dense(attention(*heads).reshape(x.shape), layer["out"])
        h = jax.nn.gelu(dense(normed(x, layer["ln_2"]), layer["up"]))
        x = x + dense(h, layer["down"])
    return normed(x, params["ln_f"]) @ params["wte"].T


def _dense(*shape):
    return {"kernel": shape, "bias": shape[-1:]}


_NORM = {"scale": (WIDTH,), "bias": (WIDTH,)}
GPT2 = {
    "wte": (VOCABULARY, WIDTH),
    "wpe": (32, WIDTH),
    **{
        f"layer_{i}": {
            **{"ln_1": _NORM, "ln_2": _NORM, "qkv": _dense(WIDTH, 3 * WIDTH)},
            **{"out": _dense(WIDTH, WIDTH), "up": _dense(WIDTH, HIDDEN)},
            "down": _dense(HIDDEN, WIDTH),
        }
        for i in range(LAYERS)
    },
    "ln_f": _NORM,
}
_GPT2 = {"attn.c_attn": "qkv", "attn.c_proj": "out", "mlp.c_fc": "up", "mlp.c_proj": "down"}
GPT2_NAMES = Names(
    ("transformer.{e}", "{e}", "embedding"),
    *(
        (f"transformer.h.{{i}}.{theirs}", f"layer_{{i}}/{ours}/kernel", "transposed")
        for theirs, ours in _GPT2.items()
    ),
    *(
        (f"transformer.h.{{i}}.{theirs}.bias", f"layer_{{i}}/{ours}/bias")
        for theirs, ours in _GPT2.items()
    ),
    ("transformer.h.{i}.ln_{k}", "layer_{i}/ln_{k}/scale"),
    ("transformer.h.{i}.ln_{k}.bias", "layer_{i}/ln_{k}/bias"),
    ("transformer.ln_f", "ln_f/scale"),
    ("transformer.ln_f.bias", "ln_f/bias"),
)


def scaled(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * row(scale)


def rotated(x):
    rates = 1e4 ** -(jnp.arange(0.0, PER_HEAD, 2) / PER_HEAD)
    angles = jnp.arange(x.shape[1] * 1.0)[:, None] * rates[None]
    cos, sin = (jnp.concatenate([f(angles)] * 2, -1)[None, :, None] for f in (jnp.cos, jnp.sin))
    one, two = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-two, one], -1) * sin


def gated(x, layer):
    return (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]


def chosen(x, layer):
    """Return the sum of the two experts that the router chooses, all of them computed."""
    chances, which = jax.lax.top_k(jax.nn.softmax(x @ layer["router"]), 2)
    chances = chances / chances.sum(-1, keepdims=True)
    weight = jnp.einsum("btk,btke->bte", chances, jax.nn.one_hot(which, EXPERTS))
    gate, up = jnp.split(jnp.einsum("btd,edh->ebth", x, layer["gate_up"]), 2, -1)
    h = jax.nn.silu(gate) * up
    return jnp.einsum("ebth,ehd,bte->btd", h, layer["experts_down"], weight)


def llama(params, tokens):
    """Return the logits, ``(batch, time, vocabulary)``; with experts where there are some."""

    def layer(x, w):
        h = scaled(x, w["norm_1"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, w[name]) for name in "qkv")
        x = x + jnp.einsum("btnh,nhd->btd", attention(rotated(q), rotated(k), v), w["o"])
        h = scaled(x, w["norm_2"])
        return x + (chosen(h, w) if "router" in w else gated(h, w)), None

    x, _ = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
    return scaled(x, params["norm"]) @ params["head"]


EXPERTS = 3
_ATTENTION = {
    **{"norm_1": (LAYERS, WIDTH), "norm_2": (LAYERS, WIDTH)},
    "q": (LAYERS, WIDTH, HEADS, PER_HEAD),
    **{name: (LAYERS, WIDTH, GROUPS, PER_HEAD) for name in "kv"},
    "o": (LAYERS, HEADS, PER_HEAD, WIDTH),
}
_OUTSIDE = {
    **{"embed": (VOCABULARY, WIDTH), "norm": (WIDTH,), "head": (WIDTH, VOCABULARY)},
}
LLAMA = _OUTSIDE | {
    "layers": _ATTENTION
    | {
        **{name: (LAYERS, WIDTH, HIDDEN) for name in ("gate", "up")},
        "down": (LAYERS, HIDDEN, WIDTH),
    }
}
MIXTRAL = _OUTSIDE | {
    "layers": _ATTENTION
    | {
        "router": (LAYERS, WIDTH, EXPERTS),
        "gate_up": (LAYERS, EXPERTS, WIDTH, 2 * HIDDEN),
        "experts_down": (LAYERS, EXPERTS, HIDDEN, WIDTH),
    }
}
_LLAMA = (
    ("model.embed_tokens", "embed", "embedding"),
    ("model.norm", "norm"),
    ("lm_head", "head"),
    ("model.layers.{i}.input_layernorm", "layers/norm_1[{i}]"),
    ("model.layers.{i}.post_attention_layernorm", "layers/norm_2[{i}]"),
    *((f"model.layers.{{i}}.self_attn.{x}_proj", f"layers/{x}[{{i}}]") for x in "qkvo"),
)
LLAMA_NAMES = Names(
    *_LLAMA,
    *((f"model.layers.{{i}}.mlp.{x}_proj", f"layers/{x}[{{i}}]") for x in ("gate", "up", "down")),
)
# transformers holds all experts of a layer in two parameters, and writes a tensor for each
MIXTRAL_NAMES = Names(
    *_LLAMA,
    ("model.layers.{i}.mlp.experts.gate_up_proj", "layers/gate_up[{i}]"),
    ("model.layers.{i}.mlp.experts.down_proj", "layers/experts_down[{i}]"),
)
_EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
MIXTRAL_CHECKPOINT = Names(
    *_LLAMA,
    ("model.layers.{i}.block_sparse_moe.gate", "layers/router[{i}]"),
    (f"{_EXPERT}.w1", f"layers/gate_up[{{i}}, {{e}}, :, :{HIDDEN}]"),
    (f"{_EXPERT}.w3", f"layers/gate_up[{{i}}, {{e}}, :, {HIDDEN}:]"),
    (f"{_EXPERT}.w2", "layers/experts_down[{i}, {e}]"),
)
