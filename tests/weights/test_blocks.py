"""Adapters of parts of a weight: of a fused kernel, of some layers of a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
import jaxlora.nnx
from jaxlora.weights import blocks

pytestmark = pytest.mark.once

TARGETS = ("qkv/kernel[:, 0:6]", "qkv/kernel[:, 12:]", "layers[1:3]")
X = normal(9, 5, 6)


def model(params, x):
    q, k, v = jnp.split(x @ params["qkv"]["kernel"], 3, axis=-1)
    x = jax.nn.softmax(q @ k.T) @ v
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def plain():
    return {"qkv": {"kernel": normal(0, 6, 18)}, "layers": normal(1, 4, 6, 6)}


def adapted(key, **options):
    config = jaxlora.LoRAConfig(**{"rank": 2, "alpha": 3.0, "targets": TARGETS} | options)
    return jaxlora.init(key, model, plain(), X, config=config)


def trained(key, **options):
    base, adapters = jaxlora.split(adapted(key, **options))
    noise = iter(jax.random.split(key, 2 * len(adapters)))
    return base, jax.tree.map(lambda x: x + jax.random.normal(next(noise), x.shape), adapters)


def test_each_part_has_factors_of_its_own(key):
    _, adapters = jaxlora.split(adapted(key))
    assert {name: (a.a.shape, a.b.shape) for name, a in adapters.items()} == {
        "layers[1:3, :, :]": ((2, 6, 2), (2, 2, 6)),
        "qkv/kernel[:, 0:6]": ((6, 2), (2, 6)),
        "qkv/kernel[:, 12:18]": ((6, 2), (2, 6)),
    }


def test_merge_adds_to_the_parts_alone(key):
    base, adapters = trained(key)
    wanted = jax.tree.map(lambda x: np.array(x, np.float64), base)
    for name, at in {
        "qkv/kernel[:, 0:6]": np.s_[:, 0:6],
        "qkv/kernel[:, 12:18]": np.s_[:, 12:],
    }.items():
        a, b = np.asarray(adapters[name].a), np.asarray(adapters[name].b)
        wanted["qkv"]["kernel"][at] += 1.5 * a @ b
    layers = adapters["layers[1:3, :, :]"]
    wanted["layers"][1:3] += 1.5 * np.einsum("sir,sro->sio", layers.a, layers.b)
    got = jaxlora.merge(jaxlora.bind(base, adapters))
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, wanted)
    back = jaxlora.unmerge(got, adapters)
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-5, atol=1e-5), back, base)


def test_low_rank_equals_merged_and_gradients_too(key):
    base, adapters = trained(key)
    fn = jaxlora.lora(model, strict=True)
    got = jax.jit(lambda a: fn(jaxlora.bind(base, a), X))(adapters)
    assert_allclose(got, model(jaxlora.merge(jaxlora.bind(base, adapters)), X), atol=1e-5)
    low = jax.grad(lambda a: jnp.sum(fn(jaxlora.bind(base, a), X) ** 2))(adapters)
    dense = jax.grad(lambda a: jnp.sum(model(jaxlora.merge(jaxlora.bind(base, a)), X) ** 2))(
        adapters
    )
    jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-4, atol=1e-4), low, dense)


def test_fresh_parts_leave_the_output_equal_and_one_more_changes_no_other(key):
    params = adapted(key)
    ulps = 4 * float(np.finfo(np.float32).eps)  # the scan is compiled, so that roundings may differ
    assert_allclose(jaxlora.lora(model)(params, X), model(plain(), X), rtol=0, atol=ulps)
    _, every = jaxlora.split(params)
    _, one = jaxlora.split(adapted(key, targets=TARGETS[:1]))
    (name,) = one
    assert_array_equal(one[name].a, every[name].a)


def test_parts_train_and_the_base_does_not(key):
    params = adapted(key)
    tx = jaxlora.freeze(optax.sgd(0.1))
    fn = jaxlora.lora(model)
    moved = params
    for _ in range(2):  # in the first step b is zero, and a does not move
        grads = jax.grad(lambda params: jnp.sum(fn(params, X) ** 2))(moved)
        updates, _ = tx.update(grads, tx.init(moved), moved)
        moved = optax.apply_updates(moved, updates)
    base, adapters = jaxlora.split(moved)
    jax.tree.map(assert_array_equal, base, plain())
    before = jaxlora.split(params)[1]
    for name in adapters:
        assert not jnp.array_equal(adapters[name].a, before[name].a)
        assert not jnp.array_equal(adapters[name].b, before[name].b)


def test_parts_save_and_load(key, tmp_path):
    base, adapters = trained(key)
    jaxlora.save_adapters(tmp_path / "adapters", adapters)
    loaded = jaxlora.load_adapters(tmp_path / "adapters", base=base)
    jax.tree.map(assert_array_equal, loaded, adapters)
    with pytest.raises(ValueError, match="for another base"):
        jaxlora.load_adapters(tmp_path / "adapters", base=jax.tree.map(jnp.ones_like, base))


def test_summary_explain_and_dropout_know_parts(key):
    params = adapted(key)
    rows = {row.path: row for row in jaxlora.summary(params).rows}
    assert rows["qkv/kernel[:, 0:6]"].total == 6 * 18 + 2 * 12
    assert rows["qkv/kernel[:, 12:18]"].total == 2 * 12
    assert set(jaxlora.explain(model, params, X).uses) == {"qkv/kernel", "layers"}
    base, adapters = trained(key)
    bound = jaxlora.bind(base, adapters)
    dropped = jaxlora.lora(model)(jaxlora.dropout(bound, key, 0.5), X)
    assert not jnp.array_equal(dropped, jaxlora.lora(model)(bound, X))


def test_part_of_an_nnx_module(key):
    linear = nnx.Linear(6, 18, rngs=nnx.Rngs(0))
    config = jaxlora.LoRAConfig(rank=2, targets=("kernel[:, :6]",))
    module = jaxlora.nnx.adapt(key, linear, X, config=config)
    module.factors["kernel[:, 0:6]"].b.set_value(jnp.ones((2, 6)))
    got = module(X)
    assert_allclose(got, jaxlora.nnx.merge(module)(X), atol=1e-5)
    assert_array_equal(got[:, 6:], linear(X)[:, 6:])
    assert not jnp.allclose(got[:, :6], linear(X)[:, :6])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qkv/kernel[3]", r"a part must be slices as \[:, 0:64\]"),
        ("qkv/kernel[:, ::2]", "a part must be slices"),
        ("qkv/kernel[:, :, :]", r"at most one for each axis of the weight's shape \(6, 18\)"),
        ("qkv/kernel[:, 6:6]", "is empty"),
        ("qkv/kernel[:, 0:1]", r"rank 2 is too large for 'qkv/kernel\[:, 0:1\]'"),
        ("kv/kernel[:, 0:6]", "matches no leaf; nearest: 'qkv/kernel'"),
        ("kernel[:, 4:8]", r"'qkv/kernel\[:, 0:6\]' and 'qkv/kernel\[:, 4:8\]' overlap|overlap"),
        ("qkv/kernel", "overlap: one element has one adapter"),
    ],
)
def test_bad_parts_are_refused(key, target, message):
    with pytest.raises(ValueError, match=message):
        adapted(key, targets=("qkv/kernel[:, 0:6]", target))


def test_exclude_takes_whole_weights(key):
    with pytest.raises(ValueError, match=r"exclude must name whole weights: got 'w\[0:2\]'"):
        jaxlora.LoRAConfig(exclude=("w[0:2]",))


def test_a_path_that_ends_in_brackets_is_no_part(key):
    config = jaxlora.LoRAConfig(rank=1, targets=("w[0:2]",))
    fn = lambda params, x: x @ params["w[0:2]"]  # noqa: E731
    params = jaxlora.init(key, fn, {"w[0:2]": normal(0, 6, 4)}, X, config=config)
    assert params["w[0:2]"].term.block is None
    base, adapters = jaxlora.split(params)
    assert jax.tree.structure(jaxlora.bind(base, adapters)) == jax.tree.structure(params)


def test_names_are_read_as_they_are_written():
    part = ((0, 4), None, (2, 3))
    path, text = blocks.parse(blocks.name("a/b", part))
    assert (path, blocks.resolve(text, (6, 5, 8))) == ("a/b", part)
    assert blocks.resolve("0:6", (6, 5)) is None
