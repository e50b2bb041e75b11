"""What adapters know of their base: which others are refused, and what JAX makes of it."""

import copy
import gc
import itertools
import pickle
import re
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from numpy.testing import assert_allclose

import jaxlora
from jaxlora.weights import fingerprints
from jaxlora.weights.fingerprints import Fingerprint

pytestmark = pytest.mark.once

X = normal(9, 5, 8)
PARTS = ("w[:, 0:4]", "w[:, 8:12]")
BASES: Any = [{"w": normal(seed, 8, 12), "other": normal(5, 3)} for seed in range(4)]


def model(params, x):
    return x.astype(params["w"].dtype) @ params["w"]


def made(base, *targets, **options) -> Any:
    """Return a base and adapters of it with no factor zero."""
    config = jaxlora.LoRAConfig(rank=2, targets=targets or ("w",), **options)
    params = jaxlora.init(jax.random.key(0), model, base, X, config=config)
    base, adapters = jaxlora.split(params)
    return base, jax.tree.map(lambda factor: factor + 0.5, adapters)


def refuses(base, adapters, **how) -> bool:
    """Tell whether adapters are refused on a base, with an error that names the weight."""
    try:
        jaxlora.bind(base, adapters, **how)
    except ValueError as error:
        if not re.search(r"adapters of 'w.*' are for another base.*check_base=False", str(error)):
            raise
        return True
    return False


def merged(base, adapters):
    return jaxlora.merge(jaxlora.bind(base, adapters))


def cast(tree, dtype=jnp.bfloat16):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("targets", [("w",), PARTS])
def test_merged_cast_and_other_weights_are_refused(targets):
    base, adapters = made(BASES[0], *targets)
    others = [merged(base, adapters), cast(base), BASES[1], {"w": -base["w"]}]
    assert [refuses(other, adapters) for other in others] == [True] * 4
    assert [refuses(other, adapters, check_base=False) for other in others] == [False] * 4
    same = [base, jax.tree.map(jnp.copy, base), jax.tree.map(np.asarray, base)]
    assert [refuses(one, adapters) for one in same] == [False] * 3
    assert not refuses({"w": base["w"]}, adapters)


def test_leaves_that_are_trained_themselves_are_refused_on_others():
    base, adapters = made(BASES[0], train=("other",))
    with pytest.raises(ValueError, match="'other' are for another base, it holds other values"):
        jaxlora.bind({**base, "other": base["other"] + 1}, adapters)


def test_values_in_memory_that_change_in_place_are_seen():
    base = jax.tree.map(np.array, BASES[0])
    base, adapters = made(base)
    assert not refuses(base, adapters)
    base["w"] += 1
    assert refuses(base, adapters)


def test_a_small_part_that_no_sample_of_the_whole_meets_is_known():
    base = {"w": normal(0, 400, 300)}
    x = normal(1, 2, 400)
    config = jaxlora.LoRAConfig(rank=1, targets=("w[1:3, 1:4]",))
    params = jaxlora.init(jax.random.key(0), model, base, x, config=config)
    base, adapters = jaxlora.split(params)
    adapters = jax.tree.map(lambda factor: factor + 0.5, adapters)
    assert refuses(merged(base, adapters), adapters)
    with pytest.raises(ValueError, match="were not merged into this weight"):
        jaxlora.unmerge(base, adapters)


def test_parts_are_merged_and_unmerged_one_after_another():
    base, adapters = made(BASES[0], *PARTS)
    first, second = ({name: adapter} for name, adapter in adapters.items())
    once = merged(base, first)
    both = merged(once, second)
    assert_allclose(both["w"], merged(base, adapters)["w"], rtol=1e-6)
    back = jaxlora.unmerge(jaxlora.unmerge(both, first), second)
    assert_allclose(back["w"], base["w"], atol=1e-5)
    assert refuses(both, first)
    assert refuses(both, second)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_only_what_was_merged_is_unmerged(dtype, size):
    base, adapters = made(cast(BASES[0], dtype))
    adapters = jax.tree.map(lambda factor: factor * size**0.5, adapters)
    plain = merged(base, adapters)
    back = jaxlora.unmerge(plain, adapters)
    eps = float(jnp.finfo(dtype).eps)
    largest = float(jnp.max(jnp.abs(plain["w"].astype(jnp.float32))))
    wanted, got = (np.asarray(x["w"], np.float32) for x in (base, back))
    assert_allclose(got, wanted, rtol=0, atol=2 * eps * largest)
    other = jax.tree.map(lambda factor: factor * 1.5, adapters)
    for call in (
        lambda: jaxlora.unmerge(base, adapters),
        lambda: jaxlora.unmerge(back, adapters),
        lambda: jaxlora.unmerge(plain, other),
        lambda: jaxlora.unmerge(merged(BASES[1], made(BASES[1])[1]), adapters),
    ):
        with pytest.raises(ValueError, match="adapters of 'w' were not merged into this weight"):
            call()
    jaxlora.unmerge(base, adapters, check_base=False)


def test_fresh_adapters_unmerge_from_their_base():
    config = jaxlora.LoRAConfig(rank=2)
    params = jaxlora.init(jax.random.key(0), model, BASES[0], X, config=config)
    base, adapters = jaxlora.split(params)
    assert jnp.array_equal(jaxlora.unmerge(base, adapters)["w"], base["w"])


def test_quantized_weights_are_known_by_their_codes_and_scales():
    def quantized(params):
        config = jaxlora.QuantizationConfig(block_size=4)
        return jaxlora.quantize(model, params, X, config=config)

    for targets in (("w",), PARTS):
        base, adapters = made(quantized(BASES[0]), *targets)
        assert not refuses(quantized(BASES[0]), adapters)
        others = [BASES[0], quantized(BASES[1]), quantized({"w": 4 * BASES[0]["w"]})]
        assert [refuses(other, adapters) for other in others] == [True] * 3
        plain = merged(base, adapters)
        assert refuses(plain, adapters)
        assert_allclose(
            jaxlora.unmerge(plain, adapters)["w"], jaxlora.dequantize(base)["w"], atol=1e-4
        )


def test_under_jit_and_for_shapes_only_dtypes_are_compared():
    base, adapters = made(BASES[0])
    jax.jit(jaxlora.bind)(BASES[1], adapters)
    jaxlora.bind(jax.eval_shape(lambda: BASES[1]), adapters)
    for other in (jax.eval_shape(lambda: cast(BASES[0])), cast(BASES[0])):
        with pytest.raises(ValueError, match="must be float32: got bfloat16"):
            jax.eval_shape(jaxlora.bind, other, adapters)
    _, unknown = jax.jit(jaxlora.split)(jaxlora.bind(base, adapters))
    assert not refuses(BASES[1], unknown)
    assert jax.jit(lambda a: jaxlora.bind(base, a))(adapters)["w"].shape == (8, 12)
    with pytest.raises(ValueError, match="'w' are for another base"):
        jax.jit(lambda a: jaxlora.bind(BASES[1], a))(adapters)


def test_a_jitted_step_keeps_what_adapters_know(tmp_path):
    base, adapters = made(BASES[0])
    tx = optax.sgd(0.1, momentum=0.9)

    traces = []

    @jax.jit
    def step(base, adapters, state):
        traces.append(0)
        fn = jaxlora.lora(model)
        grads = jax.grad(lambda a: jnp.sum(fn(jaxlora.bind(base, a), X) ** 2))(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    trained, state = step(base, adapters, tx.init(adapters))
    assert not refuses(base, trained)
    assert refuses(BASES[1], trained)
    jaxlora.save_adapters(tmp_path / "one", trained)
    with pytest.raises(ValueError, match="holds other values"):
        jaxlora.load_adapters(tmp_path / "one", base=BASES[1])
    merged_base = merged(base, trained)
    _, again = made(merged_base)
    trained, _ = step(merged_base, again, state)  # the program that was compiled for the first
    assert len(traces) == 1
    assert not refuses(merged_base, trained)
    assert refuses(BASES[1], trained)
    with pytest.warns(UserWarning, match="pass base= to save_adapters"):
        jaxlora.save_adapters(tmp_path / "two", trained)
    jaxlora.save_adapters(tmp_path / "two", trained, base=merged_base)
    with pytest.raises(ValueError, match="holds other values"):
        jaxlora.load_adapters(tmp_path / "two", base=base)


def test_the_right_base_is_accepted_however_trees_were_mixed():
    pairs = [made(base) for base in BASES]
    inner = jax.jit(lambda a: jax.tree.map(lambda x: 2 * x, a))
    outer = jax.jit(lambda a: inner(jax.tree.map(lambda x: x + 1, a)))
    results = [outer(inner(adapters)) for _, adapters in pairs[:3]]
    for (base, _), result in itertools.product(pairs[:3], results):
        assert not refuses(base, result)
    assert all(refuses(BASES[3], result) for result in results)
    assert not refuses(*pairs[3])
    assert refuses(BASES[0], pairs[3][1])


def test_loaded_adapters_know_the_base_they_were_loaded_for(tmp_path):
    base, adapters = made(BASES[0], *PARTS)
    jaxlora.save_adapters(tmp_path / "a", adapters)
    for given in (base, jax.eval_shape(lambda: base)):
        loaded = jaxlora.load_adapters(tmp_path / "a", base=given)
        assert not refuses(base, loaded)
        assert refuses(BASES[1], loaded)
        assert refuses(merged(base, loaded), loaded)
    jaxlora.unmerge(merged(base, loaded), loaded)


def test_adapters_that_are_read_into_others_are_refused_where_those_are():
    base, adapters = made(BASES[0])
    for copied in (copy.deepcopy(adapters), pickle.loads(pickle.dumps(adapters))):
        assert jax.tree.structure(copied) == jax.tree.structure(adapters)
        assert not refuses(base, copied)
        assert refuses(BASES[1], copied)
        with pytest.raises(ValueError, match="were not merged"):
            jaxlora.unmerge(base, copied)


def test_nothing_is_moved_and_nothing_of_the_base_is_kept(monkeypatch):
    base = jax.tree.map(jnp.copy, BASES[0])
    watched = weakref.ref(base["w"])
    moved = []
    monkeypatch.setattr(jax, "device_get", moved.append)
    with jax.transfer_guard_device_to_host("disallow"):
        base, adapters = made(base)
        jaxlora.bind(base, adapters)
    assert not moved
    del base
    gc.collect()
    assert watched() is None
    assert refuses(BASES[1], adapters)


def test_fingerprints_are_equal_and_one_from_then_on():
    one, two, three = (fingerprints.take(base["w"]) for base in BASES[:3])
    digests = [str(print_.digest) for print_ in (one, two, three)]
    assert len({*digests}) == 3
    assert one == two
    assert hash(one) == hash(two)
    assert (one.digest, two.digest, three.digest) == (None, None, digests[2])
    assert [one.refusal(base["w"]) is None for base in BASES] == [True, True, False, False]
    assert two == three  # and so the first knows of it too
    assert [one.refusal(base["w"]) is None for base in BASES] == [True, True, True, False]
    assert f"not {' or '.join(sorted(digests))}" in (one.refusal(BASES[3]["w"]) or "")
    assert three == Fingerprint()
    assert one.refusal(BASES[3]["w"]) is None
    assert one != "another thing"


def test_one_base_seen_many_times_is_known_and_many_bases_are_not():
    first = fingerprints.take(BASES[0]["w"])
    for _ in range(100):
        assert first == fingerprints.take(jnp.copy(BASES[0]["w"]))
    assert len(first.bases) <= 64
    assert first.digest is not None
    for seed in range(100):
        assert first == fingerprints.take(normal(seed, 3))
    assert first.bases == ()


def test_threads_that_compare_lose_no_base():
    prints = [fingerprints.take(normal(seed, 8)) for seed in range(16)]
    start = threading.Barrier(8)

    def compare(offset):
        start.wait()
        for i in range(0, 16):
            assert prints[(i + offset) % 16] == prints[(i * (offset + 1)) % 16]

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for print_ in prints:
        assert all(print_.refusal(normal(seed, 8)) is None for seed in range(16))
        assert print_.refusal(normal(17, 8)) is not None
