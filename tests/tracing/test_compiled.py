"""What the compiler makes of a training step: bounds on the program, not on its time."""

import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxlora

LAYERS, WIDTH, HIDDEN, RANK = 2, 64, 256, 4
TOKENS = (4, 96)  # batch and time; 384 tokens, so that no activation has the size of a weight


def step_of(form, dtype=jnp.float32):
    """Return the adapted loss of the benchmark's model, its gradient, and their arguments."""
    model = models.Transformer(LAYERS, heads=2, hidden=HIDDEN)
    x = jax.random.normal(jax.random.key(0), (*TOKENS, WIDTH))
    params = jax.tree.map(lambda w: w.astype(dtype), model.init(jax.random.key(1), x))
    config = jaxlora.LoRAConfig(rank=RANK, targets=models.TARGETS)
    base, adapters = jaxlora.split(
        jaxlora.init(jax.random.key(2), model.apply, params, x, config=config)
    )
    keys = iter(jax.random.split(jax.random.key(3), 2 * len(adapters)))
    adapters = jax.tree.map(lambda f: 0.1 * jax.random.normal(next(keys), f.shape), adapters)
    apply = jaxlora.lora(model.apply, strict=True, form=form)

    def loss(adapters, base, x):
        return models.loss(apply(jaxlora.bind(base, adapters), x), x)

    return jax.value_and_grad(loss), (adapters, base, x)


def arrays_made(program, *sizes):
    """Return the results of operations in optimized HLO that have as many elements as these."""
    found = []
    for line in program.splitlines():
        made = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if made and np.prod([int(n) for n in made[3].split(",")]) in sizes:
            found.append((made[4], line.strip()[:120]))
    return found


WEIGHTS = (WIDTH * WIDTH, WIDTH * HIDDEN)
ACTIVATIONS = tuple(int(np.prod(TOKENS)) * size for size in (WIDTH, HIDDEN))


@pytest.mark.parametrize("form", ["auto", "factored", "weight-side"])
def test_no_activation_is_transposed(form, compiled):
    fn, args = step_of(form)
    program = compiled(fn, *args).as_text()
    transposed = [
        line
        for kind, line in arrays_made(program, *ACTIVATIONS)
        if kind == "transpose" and "dimensions={1,0}" in line
    ]
    copied = re.findall(rf"= f32\[(?:{WIDTH}|{HIDDEN}),{np.prod(TOKENS)}\]", program)
    assert not transposed
    assert not copied


@pytest.mark.parametrize("form", ["auto", "factored", "weight-side"])
def test_gradients_of_factors_have_the_rank_first(form, compiled):
    """In memory, that is: a layout of {0,1} has the second axis first."""
    fn, args = step_of(form)
    program = compiled(fn, *args).as_text()
    assert re.findall(rf"= f32\[{RANK},(?:{WIDTH}|{HIDDEN})\]\S* dot\(", program)
    assert not re.findall(rf"= f32\[(?:{WIDTH}|{HIDDEN}),{RANK}\]\{{1,0\}} dot\(", program)


def test_factored_step_makes_no_array_of_the_size_of_a_weight(compiled):
    fn, args = step_of("factored")
    program = compiled(fn, *args).as_text()
    kinds = {kind for kind, _ in arrays_made(program, *WEIGHTS)}
    assert kinds <= {"parameter", "bitcast", "get-tuple-element"}


def test_weight_side_step_keeps_no_weight_between_the_passes(compiled):
    fn, args = step_of("weight-side")
    factored, _ = step_of("factored")
    temporary = [compiled(fn, *args).memory_analysis().temp_size_in_bytes for fn in (fn, factored)]
    assert temporary[0] <= temporary[1] + 2 * 4 * max(WEIGHTS)


@pytest.mark.parametrize("form", ["factored", "weight-side"])
def test_operations_of_a_step(form, compiled):
    fn, args = step_of(form)
    model = models.Transformer(LAYERS, heads=2, hidden=HIDDEN)

    def floor(vector, params, x):
        return models.loss(model.apply(params, x + vector.reshape(1, 1, -1)), x)

    base = compiled(jax.value_and_grad(floor), jnp.zeros(WIDTH), args[1], args[2])
    tokens = np.prod(TOKENS)
    sides = LAYERS * np.array(
        [4 * 2 * WIDTH + 2 * (WIDTH + HIDDEN), 4 * WIDTH**2 + 2 * WIDTH * HIDDEN]
    )
    extra = {
        "factored": 6 * tokens * RANK * sides[0],
        "weight-side": 4 * tokens * RANK * sides[0] + 4 * RANK * sides[1],
    }[form]
    got = compiled(fn, *args).cost_analysis()["flops"]
    assert got <= (base.cost_analysis()["flops"] + extra) * 1.03


@pytest.mark.parametrize("form", ["auto", "factored", "weight-side"])
def test_forms_agree_with_autodiff_of_the_plain_formula(form):
    fn, (adapters, base, x) = step_of(form)
    model = models.Transformer(LAYERS, heads=2, hidden=HIDDEN)

    def plain(adapters):
        merged = jaxlora.merge(jaxlora.bind(base, adapters))
        return models.loss(model.apply(merged, x), x)

    value, grads = jax.jit(fn)(adapters, base, x)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(plain))(adapters)
    assert_allclose(value, wanted, rtol=1e-5)
    for got, right in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        assert jnp.linalg.norm(got - right) <= 1e-5 * jnp.linalg.norm(right)


def use_of(tokens, dtype=jnp.float32, platform="cpu", precision=None):
    """Return how explain tells of a product of an 8 x 8 weight with this many tokens."""

    def fn(params, x):
        return jnp.matmul(x, params["w"], precision=precision)

    params, x = {"w": jnp.zeros((8, 8), dtype)}, jnp.zeros((tokens, 8), dtype)
    config = jaxlora.LoRAConfig(rank=2)
    params = jaxlora.init(jax.random.key(0), fn, params, x, config=config)
    (use,) = jaxlora.explain(fn, params, x, platform=platform).uses["w"]
    return use.form, use.why


def test_the_form_is_the_cheaper_one_that_is_exact():
    assert use_of(tokens=8) == ("factored", "it moves less with 8 tokens")  # N (d + k) = 2 d k
    assert use_of(tokens=9) == ("weight-side", "it moves less with 9 tokens")
    in_bfloat16 = use_of(tokens=9, dtype=jnp.bfloat16)
    assert in_bfloat16 == ("factored", "the sum would be rounded to bfloat16")


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_form_is_that_of_the_platform(platform):
    rounded = ("factored", f"{platform} rounds the operands of a product")
    assert use_of(9, platform=platform) == rounded
    assert use_of(9, platform=platform, precision="highest")[0] == "weight-side"
    with pytest.raises(ValueError, match=r"platform must be one of .*: got 'metal'"):
        use_of(9, platform="metal")


def lowered(form, platform):
    """Return a step as text for a platform; no device and no compiler for it is needed."""
    fn, args = step_of(form)
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_program_is_lowered_in_the_form_of_its_platform():
    def weights_made(text):  # the sums in the place of a base
        return len(re.findall(rf"stablehlo.add .*tensor<{WIDTH}x(?:{WIDTH}|{HIDDEN})xf32>", text))

    made = weights_made(lowered("weight-side", "cpu"))
    assert made > 0
    assert weights_made(lowered("auto", "cpu")) > 0
    assert weights_made(lowered("auto", "tpu")) == 0
    assert weights_made(lowered("weight-side", "tpu")) == made


def test_activations_are_flattened_on_cpu_alone():
    def flattened(platform):
        tokens, batch, time = TOKENS[0] * TOKENS[1], *TOKENS
        flat = rf"reshape .*tensor<{batch}x{time}x\d+xf32>\) -> tensor<{tokens}x\d+xf32>"
        return len(re.findall(flat, lowered("factored", platform)))

    assert flattened("cpu") > 0
    assert flattened("tpu") == 0


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"form must be one of .*: got 'dense'"):
        jaxlora.lora(lambda x: x, form="dense")  # pyright: ignore[reportArgumentType]
