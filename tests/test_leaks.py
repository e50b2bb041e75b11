"""What a function from `jaxlora.lora` was called with is let go of, also after a failed call."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora

X = jnp.ones((2, 64))


def model(p, x):
    return jax.checkpoint(lambda w, x: jax.nn.relu(x @ w))(p["w"], x)


SHARED = jaxlora.lora(model)


def total(fn):
    return lambda params, x: fn(params, x).sum()


def split_and_bind(params, x):
    base, adapters = jaxlora.split(params)
    jax.grad(lambda a: SHARED(jaxlora.bind(base, a), x).sum())(adapters)


CALLS = {
    "eager": lambda p, x: jaxlora.lora(model)(p, x),
    "jit": lambda p, x: jax.jit(jaxlora.lora(model))(p, x),
    "grad": lambda p, x: jax.grad(total(jaxlora.lora(model)))(p, x),
    "jit of grad": lambda p, x: jax.jit(jax.grad(total(jaxlora.lora(model))))(p, x),
    "weight-side": lambda p, x: jax.grad(total(jaxlora.lora(model, form="weight-side")))(p, x),
    "one function": lambda p, x: jax.grad(total(SHARED))(p, x),
    "closed over": split_and_bind,
    "explain": lambda p, x: jaxlora.explain(model, p, x),
    "merge": lambda p, x: jaxlora.merge(p),
}


def adapted(fn=lambda p, x: x @ p["w"]):
    """Return adapted weights, and a reference to their base that does not keep it."""
    plain = {"w": jnp.ones((64, 64))}
    config = jaxlora.LoRAConfig(rank=1)
    params = jaxlora.init(jax.random.key(0), fn, plain, X, config=config)
    return params, weakref.ref(plain["w"])


@pytest.mark.parametrize("name", CALLS)
def test_base_is_let_go_of_after_a_call(name):
    params, base = adapted()
    CALLS[name](params, X)
    del params
    gc.collect()
    assert base() is None


@pytest.mark.parametrize("form", ["factored", "weight-side"])
def test_no_tracer_is_kept(form):
    params, _ = adapted()
    with jax.checking_leaks():
        jax.jit(jaxlora.lora(model, form=form))(params, X)
        jax.jit(jax.grad(total(jaxlora.lora(model, form=form)), allow_int=True))(params, X)


def test_base_is_let_go_of_after_a_call_that_failed():
    params, base = adapted()
    run = jaxlora.lora(lambda p, x: jnp.linalg.svd(p["w"])[1] + x.sum(), strict=True)
    with pytest.raises(ValueError, match="strict=True needs a low-rank rule"):
        run(params, X)
    del params
    gc.collect()
    assert base() is None


def objects():
    gc.collect()
    return sum(str(type(x).__module__).startswith("jaxlora") for x in gc.get_objects())


def test_function_made_anew_for_each_call_is_let_go_of():
    params, _ = adapted()
    CALLS["jit of grad"](params, X)
    before = objects()
    for _ in range(8):
        CALLS["jit of grad"](params, X)
    assert objects() <= before


def test_constant_of_inner_programs_is_held_by_none_of_them():
    constant = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    inner = [jax.jit(lambda w, x, i=i: x @ w @ jnp.asarray(constant) + i) for i in range(4)]

    def fn(p, x):
        return sum(f(p["w"], x) for f in inner)

    params, _ = adapted(fn)
    text = jax.jit(jaxlora.lora(fn)).lower(params, X).as_text()
    assert text.count("dense<") <= text.count('dense<"') + 40
    assert text.count('dense<"') == 1  # the constant, once for all
    run = jaxlora.lora(fn)
    gc.collect()
    before = len(jax.live_arrays())
    run(params, X)
    gc.collect()
    assert len(jax.live_arrays()) == before
