"""What Flax Linen offers beyond layers: lifted transforms, wrappers, collections, boxes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from cases import Case, normal
from flax.core import freeze
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora

pytestmark = pytest.mark.once

X = normal(1, 5, 8)
SEQUENCES = normal(2, 2, 7, 8)


def close(got, wanted):
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)


def linen(model, *args, **how):
    variables = jax.jit(model.init)(jax.random.key(0), *args)
    return Case(functools.partial(model.apply, **how), variables, args)


def boxed(*names):
    return nn.with_partitioning(nn.initializers.lecun_normal(), names)


class Projection(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="projection")(x)


class Shared(nn.Module):
    def setup(self):
        self.inner = Projection()
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return jnp.tanh(self.inner(x))


def sharing_a_scope():
    return linen(Shared(), X)


def intercepted():
    def doubled(call, args, kwargs, context):
        y = call(*args, **kwargs)
        return 2.0 * y if isinstance(context.module, nn.Dense) else y

    def fn(variables, x):
        with nn.intercept_methods(doubled):
            return Projection().apply(variables, x)

    return Case(fn, Projection().init(jax.random.key(0), X), (X,))


def recurrent():
    return linen(nn.RNN(nn.LSTMCell(4)), SEQUENCES, seq_lengths=jnp.array([3, 7]))


def recurrent_both_ways():
    forward, backward = nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.SimpleCell(4))
    return linen(nn.Bidirectional(forward, backward), SEQUENCES)


def each_of_an_ensemble():
    axes: Any = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
    return linen(nn.vmap(Projection, in_axes=0, out_axes=1, **axes)(), SEQUENCES)


def all_of_an_ensemble_on_one_input():
    axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
    return linen(nn.vmap(Projection, axis_size=3, **axes)(), X)


def shared_by_an_ensemble():
    axes: Any = {"variable_axes": {"params": None}, "split_rngs": {"params": False}}
    return linen(nn.vmap(Projection, **axes)(), SEQUENCES)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8, kernel_init=boxed("in", "out"), name="dense")(x)), None


def boxed_layers_scanned_with_remat():
    loop = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return linen(loop(), X, None)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.jit(nn.Dense)(8)(x)
        dense = nn.Dense(8, name="dense")
        return nn.cond(x[0, 0] > 0, lambda m, x: m(x), lambda m, x: -m(x), dense, x)


def jitted_and_branching():
    return linen(Branches(), X)


def kept_transposed():
    def turn(variables):
        return jax.tree.map(lambda w: w.T, variables)

    return linen(nn.map_variables(nn.Dense, "params", turn, turn, init=True)(6), X)


class Slope(nn.Module):
    @nn.compact
    def __call__(self, x):
        y, back = nn.vjp(lambda module, x: jnp.tanh(module(x)), nn.Dense(6, name="dense"), x)
        return y, back(jnp.ones_like(y))[1]


def with_a_gradient_inside():
    return linen(Slope(), X)


class Watched(nn.Module):
    def setup(self):
        self.up, self.down = nn.Dense(6), nn.Dense(8)

    def __call__(self, x):
        h = self.perturb("moved", jnp.tanh(self.up(x)))
        self.sow("intermediates", "h", h)
        return self.down(h)

    def encode(self, x):
        return self.up(x)


def sown_captured_and_perturbed():
    return linen(Watched(), X, mutable=["intermediates"], capture_intermediates=True)


def frozen_dict():
    case = linen(Watched(), X)
    return Case(case.fn, freeze(case.params), case.args)


def spectral_norm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(6, name="dense"))(x, update_stats=True)

    return linen(Model(), X, mutable=["batch_stats"])


MODULES = [
    sharing_a_scope,
    intercepted,
    recurrent,
    recurrent_both_ways,
    each_of_an_ensemble,
    all_of_an_ensemble_on_one_input,
    shared_by_an_ensemble,
    boxed_layers_scanned_with_remat,
    jitted_and_branching,
    kept_transposed,
    with_a_gradient_inside,
    sown_captured_and_perturbed,
    frozen_dict,
    spectral_norm,
]


def results(fn, base, adapters, args):
    """Return what a function of variables returns, and the gradients of the adapters."""

    def loss(adapters):
        out = fn(jaxlora.bind(base, adapters), *args)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(out)), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(adapters)
    return out, grads


def compare(case, params, strict):
    base, adapters = jaxlora.split(params)
    merged = lambda params, *args: case.fn(jaxlora.merge(params), *args)  # noqa: E731
    got = results(jaxlora.lora(case.fn, strict=strict), base, adapters, case.args)
    close(got, results(merged, base, adapters, case.args))
    assert all(x.any() for x in jax.tree.leaves(got[1]))


@pytest.mark.parametrize("make", MODULES)
def test_module_equals_that_of_merged_weights(make, key):
    case = make()
    compare(case, case.trained(key), strict=True)


def test_ensemble_has_factors_for_each_member(key):
    _, adapters = jaxlora.split(each_of_an_ensemble().init(key))
    assert adapters["params/projection/kernel"].roles == jaxlora.weights.Roles((1,), (0,), (2,))


def test_normalized_weight_is_taken_dense_and_told(key):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(6, name="dense"))(x)

    case = linen(Model(), X)
    with pytest.warns(jaxlora.MaterializationWarning, match="'params/dense/kernel' reaches"):
        compare(case, case.trained(key), strict=False)


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxes_are_kept(box, key):
    kernel_init = box(nn.initializers.lecun_normal(), ("in", "out"))
    case = linen(nn.Dense(6, kernel_init=kernel_init), X)
    params = case.trained(key)
    assert params["params"]["kernel"].names == ("in", "out")
    assert isinstance(params["params"]["kernel"].value, jaxlora.LoRAWeight)
    base, adapters = jaxlora.split(params)
    merged = jaxlora.merge(params)
    jax.tree.map(assert_array_equal, base, case.params)
    assert nn.get_partition_spec(merged) == nn.get_partition_spec(case.params)
    without = jaxlora.merge(jaxlora.bind(nn.unbox(base), adapters))
    jax.tree.map(assert_array_equal, nn.unbox(merged), without)
    close(jaxlora.unmerge(merged, adapters), base)


def test_decoding_adapts_no_cache_and_fills_it(key):
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    variables = jax.jit(model.init)(key, jnp.zeros((2, 3, 8)))
    call = functools.partial(model.apply, mutable=["cache"])
    params = Case(call, variables, (normal(1, 2, 1, 8),)).trained(key)
    assert {path.split("/")[0] for path in jaxlora.split(params)[1]} == {"params"}
    plain, step, plain_step = jaxlora.merge(params), jax.jit(jaxlora.lora(call)), jax.jit(call)
    for i in range(3):
        x = normal(i, 2, 1, 8)
        (got, cache), (wanted, plain_cache) = step(params, x), plain_step(plain, x)
        close((got, cache), (wanted, plain_cache))
        params, plain = {**params, **cache}, {**plain, **plain_cache}
    assert params["cache"]["cache_index"] == 3
