"""Random programs of one weight: shape operations, a consumer, control flow around them."""

import dataclasses
import math
import string
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program ``fn(params, x)``, told by what it is made of.

    Attributes:
        told: the steps, for the report of a failure.
        fn: the program.
        shape: shape of its weight.
        x_shape: shape of its input.
        dtype: dtype of both.
        form: form of its products, as of `jaxlora.lora`.
    """

    told: str
    fn: Callable[..., Any] = dataclasses.field(repr=False)
    shape: tuple[int, ...]
    x_shape: tuple[int, ...]
    dtype: Any
    form: Any = "auto"


def _along(vector, d, ndim):
    return vector.reshape([-1 if i == d else 1 for i in range(ndim)])


def _steps(shape: tuple[int, ...], d: int) -> dict[str, Any]:
    """Return what can be done along a dimension of a weight, by name."""
    size, ndim = shape[d], len(shape)
    at = (slice(None),) * d
    vector = _along(jnp.arange(1, size + 1) / size, d, ndim)
    pads = [(1, 2) if i == d else (0, 0) for i in range(ndim)]
    steps: dict[str, Any] = {
        "rev": lambda w: jnp.flip(w, d),
        "roll": lambda w: jnp.roll(w, 1, d),
        "scale": lambda w: w * 0.5,
        "negate": lambda w: -w,
        "expand": lambda w: jnp.expand_dims(w, d),
        "swap": lambda w: jnp.swapaxes(w, d, -1),
        "barrier": lax.optimization_barrier,
        "name": lambda w: checkpoint_name(w, "w"),
        "cast": lambda w: w.astype(jnp.float32).astype(w.dtype),
        "stack": lambda w: jnp.stack([w, w * 2, -w], axis=d),
        "index": lambda w: jnp.stack([w, -w])[jnp.int32(1)],
        "entries": lambda w: jnp.stack(jnp.unstack(w, axis=d)[::-1], axis=d),
        "sum": lambda w: jnp.stack([w, w * 2], axis=d).sum(d),
        "difference": lambda w: w * 3 - w,
        "jit": jax.jit(lambda w: w * 1),
    }
    if size != math.prod(shape):
        steps |= {
            "vector": lambda w: w * vector.astype(w.dtype),
            "divide": lambda w: w / vector.astype(w.dtype),
        }
    if size > 1:
        steps |= {
            "pad": lambda w: jnp.pad(w, pads),
            "join": lambda w: jnp.concatenate([w, -w], d),
            "slice": lambda w: w[(*at, slice(1, None, 2))],
            "window": lambda w: lax.dynamic_slice_in_dim(w, 1, size - 1, d),
            "split": lambda w: jnp.split(w, [1], d)[1],
        }
    return steps


def _regroup(draw: Any, shape: tuple[int, ...], atoms: list[int]) -> tuple[str, Any, list[int]]:
    """Return a reshape that joins two dimensions, or cuts one that is one axis.

    Args:
        draw: as of `hypothesis.strategies.composite`.
        shape: shape of the weight.
        atoms: number of axes that each dimension is made of.
    """
    d = draw(st.integers(0, len(shape) - 1))
    n = shape[d]
    if atoms[d] == 1 and n % 2 == 0 and draw(st.booleans()):
        new = (*shape[:d], 2, n // 2, *shape[d + 1 :])
        return f"cut {d}", lambda w: w.reshape(new), [*atoms[:d], 1, 1, *atoms[d + 1 :]]
    if d + 1 < len(shape):
        new = (*shape[:d], n * shape[d + 1], *shape[d + 2 :])
        joined = [*atoms[:d], atoms[d] + atoms[d + 1], *atoms[d + 2 :]]
        return f"join {d}", lambda w: w.reshape(new), joined
    order = draw(st.permutations(range(len(shape))))
    return f"order {order}", lambda w: w.transpose(order), [atoms[i] for i in order]


def _shape(fn, shape):
    return jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


@st.composite
def shape_operations(draw, shape, regroup=True):
    """Draw a chain of shape operations; return it told, as a function, and its final shape."""
    told, steps, now = [], [], tuple(shape)
    for _ in range(draw(st.integers(0, 3))):
        d = draw(st.integers(0, len(now) - 1))
        options = _steps(now, d)
        name = draw(st.sampled_from(sorted(options)))
        new = _shape(options[name], now)
        if len(new) > 5 or math.prod(new) > 400:
            continue
        told.append(f"{name} {d}")
        steps.append(options[name])
        now = new
    atoms = [1] * len(now)
    for _ in range(draw(st.integers(0, 2)) if regroup else 0):
        name, step, atoms = _regroup(draw, now, atoms)
        told.append(name)
        steps.append(step)
        now = _shape(step, now)

    def chain(w):
        for step in steps:
            w = step(w)
        return w

    return told, chain, now


@st.composite
def products(draw, shape):
    """Draw an einsum of a weight and an input; return it told, as a function, and x's shape."""
    letters = string.ascii_lowercase[: len(shape)]
    roles = [draw(st.sampled_from("cfb")) for _ in shape]
    roles[draw(st.integers(0, len(shape) - 1))] = "c"
    shared = [n for n, role in zip(letters, roles, strict=True) if role != "f"]
    own = draw(st.sampled_from(["", "y", "yz"]))
    x_letters = "".join(draw(st.permutations([*shared, *own])))
    kept = [n for n, role in zip(letters, roles, strict=True) if role != "c"]
    out = "".join(draw(st.permutations([*kept, *own])))
    sizes = dict(zip(letters, shape, strict=True)) | {"y": 3, "z": 2}
    x_shape = tuple(sizes[n] for n in x_letters)
    if draw(st.booleans()):
        spec = f"{letters},{x_letters}->{out}"
        return spec, lambda w, x: jnp.einsum(spec, w, x), x_shape
    spec = f"{x_letters},{letters}->{out}"
    return spec, lambda w, x: jnp.einsum(spec, x, w), x_shape


FLOWS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat with policy": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.save_only_these_names("lora")
    ),
    "scan over inputs": lambda f: (
        lambda w, x: lax.scan(lambda c, x: (c, f(w, x)), 0, jnp.stack([x, -x]))[1]
    ),
    "scan, weight carried": lambda f: (
        lambda w, x: lax.scan(lambda w, x: (w, f(w, x)), w, jnp.stack([x, -x]), reverse=True)[1]
    ),
    "loop": lambda f: lambda w, x: lax.fori_loop(0, 2, lambda i, y: y + f(w, x), f(w, x), unroll=2),
    "cond": lambda f: lambda w, x: lax.cond(x.sum() > 0, f, lambda w, x: f(w, 2 * x), w, x),
    "switch": lambda f: lambda w, x: lax.switch(jnp.int32(1), [f, lambda w, x: -f(w, x)], w, x),
    "vmap over inputs": lambda f: lambda w, x: jax.vmap(f, (None, 0))(w, jnp.stack([x, -x])),
    "jvp": lambda f: lambda w, x: jax.jvp(lambda x: f(w, x), (x,), (x,))[1],
    "grad": lambda f: (
        lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(f(w, x)).astype(jnp.float32)))(x)
    ),
}
STACKED: dict[str, Callable[[Any], Any]] = {
    "scan over layers": lambda f: (
        lambda w, x: lax.scan(lambda c, w: (c, f(w, x)), 0, w, unroll=2)[1]
    ),
    "scan over layers with remat": lambda f: (
        lambda w, x: lax.scan(jax.checkpoint(lambda c, w: (c, f(w, x))), 0, w)[1]
    ),
    "vmap over layers": lambda f: lambda w, x: jax.vmap(f)(w, jnp.stack([x, 2 * x, -x])),
    "unrolled layers": lambda f: lambda w, x: [f(w[i], x) for i in range(3)],
    "layer by index": lambda f: lambda w, x: f(w[jnp.int32(2)], x),
}


@st.composite
def around(draw, f, shape):
    """Draw control flow around a function; return it told, as a function, and w's shape."""
    told = []
    for name in draw(st.lists(st.sampled_from(sorted(FLOWS)), max_size=2)):
        told.append(name)
        f = FLOWS[name](f)
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(STACKED)))
        told.append(name)
        f, shape = STACKED[name](f), (3, *shape)
    return told, f, shape


@st.composite
def programs(draw):
    """Draw a program that contracts a weight."""
    shape = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    told, chain, shaped = draw(shape_operations(shape))
    spec, consume, x_shape = draw(products(shaped))
    flows, fn, shape = draw(around(lambda w, x: consume(chain(w), x), shape))
    form = draw(st.sampled_from(["factored", "weight-side"]))
    story = f"{shape}: {', '.join(told)}; {spec}; {', '.join(flows)}"
    return Program(story, lambda params, x: fn(params["w"], x), shape, x_shape, dtype, form)


@st.composite
def lookups(draw):
    """Draw a program that reads rows of a weight, by index or by slice."""
    shape = tuple(draw(st.lists(st.integers(2, 4), min_size=2, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    n = shape[axis]
    mode = draw(st.sampled_from(["clip", "fill", "wrap", None]))
    outside = 2 if mode else 0  # without a mode an index promises to be within
    within = st.integers(-n - outside, n - 1 + outside)
    indices = jnp.array(draw(st.lists(within, min_size=1, max_size=4)))
    if draw(st.booleans()):
        indices = indices[:, None] + jnp.arange(2)[None]
    at = (slice(None),) * axis
    reads = {
        "take": lambda w: jnp.take(w, indices, axis=axis, mode=mode, fill_value=0.5),
        "index": lambda w: w[(*at, indices % n)],
        "one": lambda w: w[(*at, indices.ravel()[0] % n)],
        "rows": lambda w: lax.dynamic_slice_in_dim(w, indices.ravel()[0], n - 1, axis),
        "rows of each": lambda w: jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, n - 1, axis))(
            indices.ravel()
        ),
        "each": lambda w: jax.vmap(lambda w, i: w[(*at, i)], (None, 0))(w, indices % n),
    }
    name = draw(st.sampled_from(sorted(reads)))
    order = draw(st.permutations(range(len(shape))))
    back = [order.index(i) for i in range(len(shape))]
    before = draw(st.sampled_from(["scale", "transpose", "plain"]))
    prepared = {
        "scale": lambda w: w * 2,
        "transpose": lambda w: w.transpose(order).transpose(back),
        "plain": lambda w: w,
    }[before]
    flows, fn, shape = draw(around(lambda w, x: jnp.sin(reads[name](prepared(w))) * x, shape))
    story = f"{shape}: {before}; {name} {axis} {mode} {indices.tolist()}; {', '.join(flows)}"
    return Program(story, lambda params, x: fn(params["w"], x), shape, (), jnp.float32)


@st.composite
def convolutions(draw):
    """Draw a convolution of any layout, stride, dilation, padding and grouping."""
    n = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    window, groups = each(1, 3), draw(st.sampled_from([1, 2]))
    size, c_in, c_out = each(5, 6), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 2))
    spatial = "XYZ"[:n]
    layout = "".join(draw(st.permutations(["N", "C", *spatial])))
    kernel = "".join(draw(st.permutations(["I", "O", *spatial])))
    sizes = dict(zip(spatial, window, strict=True)) | {"I": c_in, "O": c_out}
    x_sizes = dict(zip(spatial, size, strict=True)) | {"N": 2, "C": c_in * groups}
    how = {
        "window_strides": each(1, 2),
        "padding": draw(st.sampled_from(["SAME", "VALID"]))
        if draw(st.booleans())
        else tuple(zip(each(0, 2), each(0, 2), strict=True)),
        "rhs_dilation": each(1, 2),
        "dimension_numbers": (layout, kernel, layout),
        "feature_group_count": groups,
    }
    how["padding"] = "SAME" if how["padding"] == "VALID" else how["padding"]
    if not isinstance(how["padding"], str):
        how["lhs_dilation"] = each(1, 2)
    flows, fn, shape = draw(
        around(lambda w, x: lax.conv_general_dilated(x, w, **how), [sizes[c] for c in kernel])
    )
    x_shape = tuple(x_sizes[c] for c in layout)
    story = f"{shape}: {how}; {', '.join(flows)}"
    return Program(story, lambda params, x: fn(params["w"], x), tuple(shape), x_shape, jnp.float32)
