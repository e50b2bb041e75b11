"""Merging weights that are larger than the blocks by which a CPU folds them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from dense_products import matrices
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from jaxlora.trees import folding
from jaxlora.weights.roles import Roles

NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def smaller_blocks(monkeypatch):
    """Let blocks be smaller than the weights here."""
    monkeypatch.setattr(folding, "_BLOCK", 2**17)


def contracted(spec):
    return lambda params, x: jnp.einsum(spec, x, params["w"])


def convolved(params, x):
    return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=NHWC)


CASES = {  # shape of the weight, program, shape of its input, targets
    "matrix": ((512, 320), contracted("bi,io->bo"), (2, 512), ("w",)),
    "transposed": ((512, 320), contracted("bi,oi->bo"), (2, 320), ("w",)),
    "heads": ((320, 8, 64), contracted("bi,ihd->bhd"), (2, 320), ("w",)),
    "out of heads": ((8, 64, 320), contracted("bhd,hdo->bo"), (2, 8, 64), ("w",)),
    "stack": ((3, 256, 384), contracted("bi,sio->sbo"), (2, 256), ("w",)),
    "stack inside": ((256, 3, 384), contracted("bsi,osi->bso"), (2, 3, 384), ("w",)),
    "kernel": ((3, 3, 64, 256), convolved, (1, 4, 4, 64), ("w",)),
    "columns": ((512, 320), contracted("bi,io->bo"), (2, 512), ("w[:, 20:200]",)),
    "rows": ((512, 320), contracted("bi,io->bo"), (2, 512), ("w[100:300]",)),
    "two parts": ((512, 320), contracted("bi,io->bo"), (2, 512), ("w[:, :64]", "w[:, 64:128]")),
    "no divisors": ((1021, 131), contracted("bi,io->bo"), (2, 1021), ("w",)),
    "long rows": ((2, 2**17), contracted("bi,io->bo"), (2, 2), ("w",)),
}


def adapted(name, dtype="float32"):
    shape, fn, x, targets = CASES[name]
    params, x = {"w": normal(0, *shape).astype(dtype)}, normal(1, *x).astype(dtype)
    config = jaxlora.LoRAConfig(rank=2, targets=targets)
    params = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    base, adapters = jaxlora.split(params)
    return jaxlora.bind(base, jax.tree.map(lambda leaf: leaf + 0.1, adapters))


def exact(params):
    """Return the sum of the base and the products, by NumPy in float64."""
    node, (_, adapters) = params["w"], jaxlora.split(params)
    total = np.array(node.base, np.float64)
    products = matrices(adapters)
    for name, adapter in adapters.items():
        index = tuple(slice(*bounds) if bounds else slice(None) for bounds in adapter.block or ())
        part = total[index]
        roles = adapter.roles
        order = (*roles.stack, *roles.in_, *roles.out)
        shape = [part.shape[axis] for axis in order]
        part += products[name].reshape(shape).transpose(np.argsort(order))
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_each_element_is_the_sum_rounded_once(name, dtype):
    params = adapted(name, dtype)
    wanted, half = exact(params), float(jnp.finfo(dtype).eps) / 2
    merged = jaxlora.merge(params)["w"]
    assert merged.dtype == dtype
    error = np.abs(np.asarray(merged, np.float64) - wanted)
    assert (error <= half * np.abs(wanted) + 1e-6).all()
    told = jaxlora.merge_error(params)["w"]
    assert_allclose(told, error.max(), rtol=1e-2, atol=1e-6)
    base, adapters = jaxlora.split(params)
    undone = jaxlora.unmerge({"w": merged}, adapters, check_base=False)["w"]
    undone, before = (np.asarray(x, np.float64) for x in (undone, base["w"]))
    assert_allclose(undone, before, atol=15 * half)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_is_merged_under_jit(name):
    params = adapted(name, "bfloat16")
    assert_array_equal(jaxlora.merge(params)["w"], jax.jit(jaxlora.merge)(params)["w"])


@pytest.mark.parametrize("spec", ["bi,io->bo", "bi,oi->bo", "bi,sio->sbo"])
def test_no_sum_of_the_size_of_a_weight_is_made(spec, compiled):
    shape = (2, 1024, 1024)[-len(spec.split(",")[1].split("->")[0]) :]
    params, x = {"w": normal(0, *shape, dtype="float16")}, jnp.ones((2, 1024), "float16")
    config = jaxlora.LoRAConfig(rank=2)
    node = jaxlora.init(jax.random.key(0), contracted(spec), params, x, config=config)["w"]
    how = folding.How(1, with_error=True)
    temp, of_whole = (
        compiled(functools.partial(fold, how=how), node.base, node.terms)
        .memory_analysis()
        .temp_size_in_bytes
        for fold in (folding._folded_by_blocks, folding._folded)
    )
    assert temp < 2 * node.base.nbytes < of_whole


@pytest.mark.parametrize("name", ["matrix", "stack", "rows"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["base", "a", "b"])
def test_what_is_not_finite_anywhere_is_named(name, dtype, where, value):
    """XLA's largest of many numbers of float32 passes over NaN on a CPU."""
    node = adapted(name, dtype)["w"]
    arrays = {"base": node.base, "a": node.a, "b": node.b}
    arrays[where] = arrays[where].at[-1, -1].set(value)
    term = dataclasses.replace(node.term, a=arrays["a"], b=arrays["b"])
    params = {"w": jaxlora.LoRAWeight(arrays["base"], (term,))}
    for merge in (jaxlora.merge, jaxlora.merge_error):
        with pytest.raises(ValueError, match=f"merged weight 'w' is not finite: {where} hold NaN"):
            merge(params)


def test_weights_of_numpy_and_quantized_weights_are_merged_alike():
    params = adapted("matrix", "bfloat16")
    base, adapters = jaxlora.split(params)
    of_numpy = jaxlora.merge(jaxlora.bind({"w": np.asarray(base["w"])}, adapters))["w"]
    assert_array_equal(of_numpy, jaxlora.merge(params)["w"])
    fn, x = contracted("bi,io->bo"), jnp.ones((2, 512), jnp.bfloat16)
    config = jaxlora.QuantizationConfig("int8")
    small = jaxlora.quantize(fn, base, x, config=config)
    wide = jaxlora.dequantize(small)
    one, other = (jaxlora.bind(plain, adapters, check_base=False) for plain in (small, wide))
    assert_array_equal(jaxlora.merge(one)["w"], jaxlora.merge(other)["w"])
    bad = {"w": dataclasses.replace(adapters["w"], b=adapters["w"].b.at[0, 0].set(jnp.nan))}
    with pytest.raises(ValueError, match="merged weight 'w' is not finite: b hold NaN"):
        jaxlora.merge(jaxlora.bind(small, bad, check_base=False), requantize=True)


def test_a_change_that_is_not_finite_anywhere_is_refused():
    before = {"w": normal(0, 512, 320)}
    after = {"w": before["w"].at[-1, -1].set(jnp.nan)}
    with pytest.raises(ValueError, match="the change of the leaf 'w' is not finite"):
        jaxlora.algebra.extract(before, after, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_without_elements_is_merged(dtype):
    roles = Roles((), (0,), (1,))
    adapter = jaxlora.Adapter(jnp.ones((0, 2)), jnp.ones((2, 4)), roles, alpha=2.0, shape=(0, 4))
    params = jaxlora.bind({"w": jnp.ones((0, 4), dtype)}, {"w": adapter})
    merged = jaxlora.merge(params)
    assert (merged["w"].shape, merged["w"].dtype) == ((0, 4), dtype)
    assert jaxlora.merge_error(params) == {"w": 0}
    assert jaxlora.unmerge(merged, {"w": adapter})["w"].shape == (0, 4)
