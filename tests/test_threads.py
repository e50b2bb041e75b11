"""One function from `jaxlora.lora` called from many threads at once gives each its own result.

``THREAD_CALLS`` is the number of calls of each thread; 250 is the long run.
"""

import collections
import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from jax import lax
from nodes import with_factors

import jaxlora

pytestmark = pytest.mark.once

THREADS, CALLS = 8, int(os.environ.get("THREAD_CALLS", "2"))
PLAIN = {name: normal(i, 2, 16, 16) for i, name in enumerate("qkv")}
X = normal(5, 4, 16)


def layer(x, p):
    return jnp.tanh(x @ p["q"]) * (x @ p["k"]) + x @ p["v"], None


def unrolled(p, x):
    for i in range(2):
        x, _ = layer(x, {name: w[i] for name, w in p.items()})
    return x


def scanned(p, x):
    return lax.scan(layer, x, p)[0]


def selected(p, x):
    chosen = lax.select(x[0, 0] > 0, p["q"], lax.stop_gradient(p["q"]))
    return unrolled(p | {"q": chosen}, x)


def jitted_inside(p, x):
    return jax.jit(unrolled)(p, jax.nn.gelu(x))


PROGRAMS = {f.__name__: f for f in (unrolled, scanned, selected, jitted_inside)}


def value(fn):
    return lambda adapters, base: fn(jaxlora.bind(base, adapters), X)


def gradient(fn):
    return jax.grad(lambda adapters, base: jnp.sum(fn(jaxlora.bind(base, adapters), X) ** 2))


@pytest.fixture
def switching():
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def drawn(adapters, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda f: jnp.asarray(rng.normal(size=f.shape) * 0.3, f.dtype), adapters)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("way", [value, gradient])
@pytest.mark.parametrize("is_quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_threads_get_their_own_results(program, is_quantized, way):
    fn, base = PROGRAMS[program], PLAIN
    if is_quantized:
        base = jaxlora.quantize(fn, base, X, config=jaxlora.QuantizationConfig("int8"))
    config = jaxlora.LoRAConfig(rank=4, targets=tuple("qkv"))
    base, first = jaxlora.split(jaxlora.init(jax.random.key(0), fn, base, X, config=config))
    mine = [drawn(first, seed) for seed in range(THREADS)]
    shared = way(jaxlora.lora(fn, strict=True))
    wanted = [jax.jit(way(jaxlora.lora(fn)))(adapters, base) for adapters in mine]
    found, start = collections.Counter(), threading.Barrier(THREADS)

    def work(i):
        start.wait()
        for call in range(CALLS):
            run = jax.jit(lambda *args: shared(*args)) if call % 2 else shared
            try:
                pairs = zip(
                    jax.tree.leaves(run(mine[i], base)), jax.tree.leaves(wanted[i]), strict=True
                )
                close = [np.allclose(x, y, rtol=0, atol=2e-3 * np.abs(y).max()) for x, y in pairs]
                found["right" if all(close) else "wrong"] += 1
            except Exception as error:
                found[f"{type(error).__name__}: {error}"] += 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"right": THREADS * CALLS}


def test_call_that_failed_leaves_the_next_one_right():
    def fn(p, x, fails):
        y = unrolled(p, x)
        return y + jnp.linalg.svd(p["v"][0])[1][:, None].T[:, :16] if fails else y

    config = jaxlora.LoRAConfig(rank=4, targets=tuple("qkv"))
    params = jaxlora.init(jax.random.key(0), unrolled, PLAIN, X, config=config)
    node = params["q"]
    params["q"] = with_factors(node, b=node.b + 0.1)
    run = jaxlora.lora(fn, strict=True)
    wanted = run(params, X, False)
    with pytest.raises(ValueError, match="strict=True needs a low-rank rule"):
        run(params, X, True)
    np.testing.assert_array_equal(run(params, X, False), wanted)
