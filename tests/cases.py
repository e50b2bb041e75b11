"""The list of programs that every law is tried on. A new case is one function here.

A case is a function marked with `case` that returns a `Case`; its name is the function's.
``tokens`` is for each target the number of rows that its factors are applied to, for the law on
operations.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxlora


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, its parameters and inputs, and what to adapt.

    Attributes:
        fn: the program, of the parameters and the inputs.
        params: its parameters.
        args: its other inputs.
        targets: as in `jaxlora.LoRAConfig`.
        tokens: rows that the factors of each target are applied to.
        compiled: whether an eager call compiles part of it, so that roundings may differ.
        rank: rank of the adapters.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    targets: Any = "all-linear"
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    compiled: bool = False
    rank: int = 2

    @property
    def config(self) -> jaxlora.LoRAConfig:
        return jaxlora.LoRAConfig(rank=self.rank, alpha=3.0, targets=self.targets)

    def init(self, key: Any) -> Any:
        """Return fresh adapted parameters."""
        return jaxlora.init(key, self.fn, self.params, *self.args, config=self.config)

    def trained(self, key: Any) -> Any:
        """Return adapted parameters whose factors are of the size of the weights, as if trained."""
        base, adapters = jaxlora.split(self.init(key))
        return jaxlora.bind(base, trained(key, adapters))

    @property
    def epsilon(self) -> float:
        """Rounding unit of the coarsest dtype of the parameters and the result."""
        shapes = jax.tree.leaves((self.params, jax.eval_shape(self.fn, self.params, *self.args)))
        kinds = [x.dtype for x in shapes if jnp.issubdtype(x.dtype, jnp.floating)]
        return max(float(jnp.finfo(kind).eps) for kind in kinds)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    """Put a case on the list."""
    CASES[make.__name__] = make
    return make


def trained(key, adapters):
    """Return factors drawn so that the product is about as large as a weight."""
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, x.shape, x.dtype) * 0.3 for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)


def normal(seed, *shape, dtype=jnp.float32):
    x = np.random.default_rng(seed).normal(size=shape) / math.sqrt(shape[0] if shape else 1)
    return jnp.asarray(x, dtype)


def linen(model, *args, **case):
    params = model.init(jax.random.key(0), *args)
    if len(params) > 1:  # other collections are inputs, not parameters
        raise ValueError(f"the case must have parameters only: got {list(params)}")
    return Case(model.apply, params, args, **case)


def of_nnx(model, *args, **case):
    graphdef, state = nnx.split(model)

    def fn(state, *args):
        return nnx.merge(graphdef, state)(*args)

    return Case(fn, state, args, **case)


def einsum(spec, *shape, x, on_left=False, **case):
    operands = (lambda w, x: (w, x)) if on_left else (lambda w, x: (x, w))
    return Case(
        lambda params, x: jnp.einsum(spec, *operands(params["w"], x)),
        {"w": normal(0, *shape)},
        (normal(1, *x),),
        **case,
    )


# products


@case
def matmul():
    return einsum("bti,io->bto", 8, 6, x=(2, 5, 8), tokens={"w": 10})


@case
def matmul_of_one_row():
    return einsum("i,io->o", 8, 6, x=(8,), tokens={"w": 1})


@case
def weight_on_the_left():
    return einsum("io,it->ot", 8, 6, x=(8, 5), on_left=True, tokens={"w": 5})


@case
def several_contracted_axes():
    return einsum("tnh,nhd->td", 2, 4, 6, x=(5, 2, 4), tokens={"w": 5})


@case
def several_free_axes():
    return einsum("td,dnh->nth", 8, 2, 4, x=(5, 8), tokens={"w": 5})


@case
def contracted_axes_in_another_order():
    return einsum("ahbn,dnch->acbd", 6, 2, 3, 4, x=(3, 4, 5, 2), tokens={"w": 15})


@case
def stack_in_batch():
    return einsum("etd,edo->eto", 3, 8, 6, x=(3, 5, 8), tokens={"w": 15})


@case
def stack_in_batch_not_first():
    return einsum("etd,deo->teo", 8, 3, 6, x=(3, 5, 8), tokens={"w": 15})


@case
def all_experts_for_every_token():
    return einsum("td,edo->teo", 3, 8, 6, x=(5, 8))


@case
def weight_of_size_one():
    return einsum("td,dxo->txo", 8, 1, 6, x=(5, 8), tokens={"w": 5})


@case
def reshaped_and_transposed():
    def fn(params, x):
        w = params["w"].reshape(6, 2, 4).transpose(1, 2, 0)[None]
        return jnp.einsum("tnh,xnhd->xtd", x, w)

    return Case(fn, {"w": normal(0, 6, 8)}, (normal(1, 5, 2, 4),), tokens={"w": 5})


@case
def fused_projections():
    def fn(params, x):
        q, k, v = jnp.split(params["qkv"], 3, axis=1)
        return jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v)

    return Case(fn, {"qkv": normal(0, 8, 18)}, (normal(1, 5, 8),))


@case
def used_twice():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"].T

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),), tokens={"w": 10})


@case
def half_precision_inside():
    def fn(params, x):
        return x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),))


@case
def half_precision_base():
    w = normal(0, 8, 6, dtype=jnp.bfloat16)
    x = normal(1, 5, 8, dtype=jnp.bfloat16)
    return Case(lambda params, x: x @ params["w"], {"w": w}, (x,))


@case
def float16_base():
    w, x = normal(0, 8, 6, dtype=jnp.float16), normal(1, 5, 8, dtype=jnp.float16)
    return Case(lambda params, x: x @ params["w"], {"w": w}, (x,))


# layers of Linen


@case
def linen_dense():
    return linen(nn.Dense(6), normal(1, 5, 8), tokens={"params/kernel": 5})


@case
def linen_dense_in_half_precision():
    return linen(nn.Dense(6, dtype=jnp.bfloat16), normal(1, 5, 8))


@case
def linen_dense_general():
    model = nn.DenseGeneral((3, 2), axis=(-2, -1))
    return linen(model, normal(1, 5, 2, 4), tokens={"params/kernel": 5})


@case
def linen_dense_general_with_batch_axis():
    model = nn.DenseGeneral(6, axis=-1, batch_dims=(0,))
    return linen(model, normal(1, 3, 5, 8), tokens={"params/kernel": 15})


@case
def linen_einsum():
    return linen(nn.Einsum((8, 2, 3), "bd,dnh->bnh"), normal(1, 5, 8), tokens={"params/kernel": 5})


@case
def linen_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    tokens = {f"params/{name}/kernel": 10 for name in ("query", "key", "value", "out")}
    return linen(model, normal(1, 2, 5, 8), tokens=tokens)


@case
def linen_embedding():
    return linen(nn.Embed(11, 8), jnp.arange(6).reshape(2, 3), targets=("embedding",))


class _Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8, name="embed")
        return embed.attend(jnp.tanh(nn.Dense(8, name="dense")(embed(tokens))))


@case
def linen_tied_embedding():
    return linen(_Tied(), jnp.arange(6).reshape(2, 3), targets=("embed", "dense"))


@case
def linen_convolution():
    return linen(nn.Conv(5, (3, 3)), normal(1, 2, 8, 7, 3))


@case
def linen_convolution_strided_and_dilated():
    model = nn.Conv(5, (3,), strides=2, kernel_dilation=2, padding="VALID")
    return linen(model, normal(1, 2, 17, 4), tokens={"params/kernel": 2 * 7})


@case
def linen_convolution_grouped():
    return linen(nn.Conv(6, (3,), feature_group_count=2), normal(1, 2, 9, 4))


@case
def linen_convolution_depthwise():
    return linen(nn.Conv(4, (3,), feature_group_count=4), normal(1, 2, 9, 4))


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(12, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(8, name="down")(h)


class _Stack(nn.Module):
    remat: bool = False
    scan: bool = True
    unroll: int = 1

    @nn.compact
    def __call__(self, x):
        block = nn.remat(_Block) if self.remat else _Block
        if not self.scan:
            for i in range(3):
                x = block(name=f"block_{i}")(x)
            return x

        def step(module, x, _):
            return module(x), None

        loop = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            unroll=self.unroll,
        )
        return loop(block(name="block"), x, None)[0]


@case
def linen_layers():
    tokens = {f"params/block_{i}/{name}/kernel": 10 for i in range(3) for name in ("up", "down")}
    return linen(_Stack(scan=False), normal(1, 2, 5, 8), tokens=tokens)


@case
def linen_layers_with_remat():
    return linen(_Stack(scan=False, remat=True), normal(1, 2, 5, 8), compiled=True)


@case
def linen_layers_scanned():
    return linen(_Stack(), normal(1, 2, 5, 8), compiled=True)


@case
def linen_layers_scanned_unrolled():
    return linen(_Stack(unroll=3), normal(1, 2, 5, 8), compiled=True)


@case
def linen_layers_scanned_with_remat():
    return linen(_Stack(remat=True), normal(1, 2, 5, 8), compiled=True)


# layers of NNX


class _Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.head = nnx.LinearGeneral(8, (3, 2), rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x + self.down(nnx.gelu(self.up(x))))


@case
def nnx_transformer():
    targets = ("embed", "query", "out", "up", "down", "head")
    return of_nnx(_Transformer(nnx.Rngs(0)), jnp.arange(6).reshape(2, 3), targets=targets)


@case
def nnx_convolution():
    return of_nnx(nnx.Conv(3, 5, (3, 3), rngs=nnx.Rngs(0)), normal(1, 2, 6, 7, 3))


class _NnxStack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(self.layers, x)


@case
def nnx_layers_scanned_with_remat():
    return of_nnx(_NnxStack(nnx.Rngs(0)), normal(1, 5, 8), compiled=True)


# control flow and derivatives


def _mlp_params():
    return {"up": normal(0, 8, 12), "down": normal(2, 12, 8)}


def _mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


@case
def inside_jit():
    return Case(jax.jit(_mlp), _mlp_params(), (normal(1, 5, 8),), compiled=True)


@case
def inside_remat_with_policy():
    policy = jax.checkpoint_policies.dots_saveable
    fn = jax.checkpoint(_mlp, policy=policy)
    return Case(fn, _mlp_params(), (normal(1, 5, 8),), compiled=True)


@case
def inside_vmap():
    fn = jax.vmap(_mlp, in_axes=(None, 0))
    tokens = {"up": 5, "down": 5}
    return Case(fn, _mlp_params(), (normal(1, 5, 8),), tokens=tokens)


@case
def stacked_layers():
    def fn(params, x):
        return jax.lax.scan(lambda x, layer: (x + _mlp(layer, x), None), x, params)[0]

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8),), compiled=True)


@case
def weight_shared_by_all_steps():
    def fn(params, x):
        return jax.lax.scan(lambda x, _: (x + _mlp(params, x), None), x, length=3)[0]

    return Case(fn, _mlp_params(), (normal(1, 5, 8),), compiled=True)


@case
def weights_out_of_a_scan():
    def fn(params, x):
        def step(x, layer):
            return x + _mlp(layer, x), jax.tree.map(jnp.transpose, layer)

        x, turned = jax.lax.scan(step, x, params)
        return x, turned["up"][1] @ x.T

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8),), compiled=True)


@case
def layers_indexed():
    def fn(params, x):
        for i in range(3):
            x = x + _mlp(jax.tree.map(lambda w, i=i: w[i], params), x)
        return x

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8),))


@case
def layer_indexed_by_an_input():
    def fn(params, x, i):
        return _mlp(jax.tree.map(lambda w: w[i], params), x)

    params = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), _mlp_params())
    return Case(fn, params, (normal(1, 5, 8), jnp.int32(1)))


@case
def expert_for_each_token():
    def fn(params, x, expert):
        return jnp.einsum("td,tdo->to", x, params["w"][expert])

    return Case(fn, {"w": normal(0, 3, 8, 6)}, (normal(1, 5, 8), jnp.array([0, 2, 1, 1, 0])))


@case
def rows_of_positions():
    def fn(params, x):
        return x @ params["w"] + params["position"][:5]

    params = {"position": normal(0, 9, 6), "w": normal(2, 8, 6)}
    return Case(fn, params, (normal(1, 5, 8),), targets=("position", "w"))


@case
def branches():
    def fn(params, x):
        return jax.lax.cond(
            x[0, 0] > 0, _mlp, lambda params, x: x @ params["up"] @ params["down"], params, x
        )

    return Case(fn, _mlp_params(), (normal(1, 5, 8),), compiled=True)


@jax.custom_jvp
def _scaled_product(x, w):
    return 2.0 * (x @ w)


@_scaled_product.defjvp
def _scaled_product_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return _scaled_product(x, w), 2.0 * (dx @ w + x @ dw)


@case
def inside_custom_jvp():
    def fn(params, x):
        return _scaled_product(jnp.tanh(_scaled_product(x, params["up"])), params["down"])

    return Case(fn, _mlp_params(), (normal(1, 5, 8),))


@case
def weights_returned():
    def fn(params, x):
        return {"y": x @ params["w"], "w": params["w"], "turned": params["w"].T, "step": 3}

    return Case(fn, {"w": normal(0, 8, 6)}, (normal(1, 5, 8),))
