"""Eight devices: a sharded program with adapters equals the merged one, and sends little more.

The program is a transformer block that runs on every layout of weights and on both kinds of mesh.
Its rank is the only size of 3, so what is of the size of the rank is known by its shape.
"""

import collections
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding
from numpy.testing import assert_allclose, assert_array_equal

import jaxlora
from devices import meshes
from jaxlora.formats import Names, safetensors

RANK = 3
HEADS, WIDTH, HEAD, HIDDEN, BATCH, TIME = 8, 32, 4, 64, 16, 10
SHAPES = {
    "query": (WIDTH, HEADS, HEAD),
    "key": (WIDTH, HEADS, HEAD),
    "value": (WIDTH, HEADS, HEAD),
    "out": (HEADS, HEAD, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
    "shift": (WIDTH,),
}
SPECS = {
    "query": P("data", "model", None),
    "key": P("data", "model", None),
    "value": P("data", "model", None),
    "out": P("model", None, "data"),
    "up": P("data", "model"),
    "down": P("model", "data"),
    "shift": P(None),
}
CONFIG = jaxlora.LoRAConfig(rank=RANK, alpha=6)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh and a layout, and the block on them."""

    kind: str
    layout: str

    @functools.cached_property
    def mesh(self):
        return meshes.make(self.kind, self.layout)

    def sharding(self, *spec):
        return NamedSharding(
            self.mesh, P(*(name if name in self.mesh.axis_names else None for name in spec))
        )

    def weight(self, params, name):
        """Return a weight as it is used: on Explicit meshes gathered along "data" by hand."""
        if self.kind == "auto":
            return params[name]
        used = (None if axis == "data" else axis for axis in SPECS[name])
        return jax.sharding.reshard(params[name], self.sharding(*used))

    def product(self, formula, x, w, *spec):
        """Return a product with its result sharded by this spec."""
        if self.kind == "explicit":
            return jnp.einsum(formula, x, w, out_sharding=self.sharding(*spec))
        return jax.lax.with_sharding_constraint(jnp.einsum(formula, x, w), self.sharding(*spec))

    def block(self, params, x):
        """Return attention and a feed-forward layer of ``x`` (batch, time, width)."""
        weight, product = functools.partial(self.weight, params), self.product
        heads = ("data", None, "model", None)
        x = x + weight("shift")[None, None]
        q, k, v = (
            product("btd,dnh->btnh", x, weight(name), *heads) for name in ("query", "key", "value")
        )
        scores = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / HEAD**0.5)
        mixed = jnp.einsum("bnts,bsnh->btnh", scores, v)
        x = x + product("btnh,nhd->btd", mixed, weight("out"), "data", None, None)
        h = jax.nn.gelu(product("btd,df->btf", x, weight("up"), "data", None, "model"))
        return x + product("btf,fd->btd", h, weight("down"), "data", None, None)

    def loss(self, params, x):
        return jnp.mean(self.block(params, x) ** 2)

    @functools.cached_property
    def arrays(self):
        """Return the adapted weights, every factor not zero, and the input."""
        rng = np.random.default_rng(1)
        base = meshes.place(meshes.random(SHAPES), SPECS, self.mesh)
        x = rng.standard_normal((BATCH, TIME, WIDTH)).astype(np.float32)
        x = jax.device_put(x, self.sharding("data", None, None))
        params = jaxlora.init(jax.random.key(0), self.block, base, x, config=CONFIG)
        _, adapters = jaxlora.split(params)

        def fill(b):
            values = 0.1 * rng.standard_normal(b.shape)
            return jax.device_put(values.astype(np.float32), b.sharding)

        filled = {n: dataclasses.replace(a, b=fill(a.b)) for n, a in adapters.items()}
        return base, filled, x


CASES = [Case(kind, layout) for kind in meshes.KINDS for layout in ("fsdp", "tp", "both")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.kind}-{case.layout}")
def case(request):
    in_use = request.param.kind == "explicit"
    with jax.set_mesh(request.param.mesh) if in_use else contextlib.nullcontext():
        yield request.param


def test_every_weight_is_adapted_and_none_is_made_dense(case):
    base, adapters, x = case.arrays
    assert set(adapters) == set(SHAPES) - {"shift"}
    report = jaxlora.explain(case.block, jaxlora.bind(base, adapters), x)
    assert report.materialized == {}, report


def test_output_and_gradients_equal_those_of_merged_weights(case):
    base, adapters, x = case.arrays
    loss = jaxlora.lora(case.loss)

    def merged_loss(adapters, base, x):
        return case.loss(jaxlora.merge(jaxlora.bind(base, adapters)), x)

    def low_rank_loss(adapters, base, x):
        return loss(jaxlora.bind(base, adapters), x)

    wanted = jax.jit(jax.value_and_grad(merged_loss))(adapters, base, x)
    got = jax.jit(jax.value_and_grad(low_rank_loss))(adapters, base, x)
    jax.tree.map(functools.partial(assert_allclose, rtol=1e-4, atol=1e-5), got, wanted)


def lora_step(case, adapters, base, x):
    """Return the loss and the adapters after a step down the gradient."""

    def loss(adapters):
        return jaxlora.lora(case.loss)(jaxlora.bind(base, adapters), x)

    value, grads = jax.value_and_grad(loss)(adapters)
    return value, jax.tree.map(lambda old, grad: old - grad, adapters, grads)


def test_step_leaves_the_factors_where_they_are(case):
    base, adapters, x = case.arrays
    _, after = jax.jit(functools.partial(lora_step, case))(adapters, base, x)
    for old, new in zip(jax.tree.leaves(adapters), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_rows_are_trained_where_the_leaf_is_and_weights_are_written(case, tmp_path):
    base, _, x = case.arrays
    rows = {"up": (1, 7, 30)}
    config = jaxlora.LoRAConfig(rank=RANK, targets=("down",), rows=rows)
    params = jaxlora.init(jax.random.key(0), case.block, base, x, config=config)
    plain, adapters = jaxlora.split(params)
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    tree = jaxlora.bind(plain, moved)
    wanted = np.array(base["up"])
    wanted[[1, 7, 30]] += np.float32(0.1)
    merged = jaxlora.merge(tree)
    assert_array_equal(merged["up"], wanted)
    assert merged["up"].sharding.is_equivalent_to(base["up"].sharding, 2)
    assert_allclose(jax.jit(jaxlora.lora(case.block))(tree, x), case.block(merged, x), 1e-4, 1e-4)
    names, sites = Names(("{w}", "{w}")), jaxlora.find_sites(case.block, base, x)
    safetensors.save(tmp_path / "it", tree, names, sites=sites)
    loaded = safetensors.load(tmp_path / "it", names, base, sites=sites)
    jax.tree.map(assert_array_equal, loaded, merged)


def test_preconditioned_gradients_are_those_of_one_device(case):
    _, adapters, _ = case.arrays
    tx = jaxlora.optim.precondition(1e-3)
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), adapters)
    wanted, _ = tx.update(alone, tx.init(alone), alone)
    for update in (tx.update, jax.jit(tx.update)):
        found, _ = update(adapters, tx.init(adapters), adapters)
        jax.tree.map(functools.partial(assert_allclose, rtol=1e-3, atol=1e-4), found, wanted)


def test_step_sends_no_more_than_the_base_but_of_the_size_of_the_rank(case):
    base, adapters, x = case.arrays

    def base_step(shift, base, x):
        return jax.value_and_grad(lambda shift: case.loss(base | {"shift": shift}, x))(shift)

    step = functools.partial(lora_step, case)
    own = collections.Counter(meshes.collectives(base_step, base["shift"], base, x))
    sent = collections.Counter(meshes.collectives(step, adapters, base, x))
    assert own
    longest = max(BATCH * TIME, HEADS * HEAD, HIDDEN)
    ranks = {RANK, 3 * RANK}  # of one weight, and of the three that read one input

    def is_small(collective):
        return any(meshes.size(collective) <= rank * longest for rank in ranks & {*collective[1]})

    too_large = {c: n for c, n in (sent - own).items() if not is_small(c)}
    assert not too_large, f"extra {too_large}\nown {own}\nsent {sent}"
